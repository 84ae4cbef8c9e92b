"""The input files of a corpus: found, named and told apart, with nothing left out silently.

Links are followed. A file keeps the name, and with it the kind and compression, under which it was found, also
where that name is a link into a store of blobs; what a link leads to only tells that two names are one file.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from .config import CorpusSection
from .decompress import entry_points, zstd_frames
from .errors import DataPrepError
from .parquet import Footer, read_footer
from .places import file_system, full_url, is_remote, local_path, open_to_read, stamp_of
from .sources import BLOCK_BYTES, InputFile, format_of

# A smaller file is read by one task in a moment; looking for its frames would take longer than it gains.
_SPLIT_BYTES = 8 * 1024**2
_ASKED_AT_A_TIME = 16  # files of a storage far away, each a round trip or two
_TELL_SECONDS = 10.0


@dataclass
class _Found:
    """What one entry of `paths` leads to: files with the folder that their names are relative to."""

    root: str
    is_folder: bool = False
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def list_corpus(
    number: int, corpus: CorpusSection, say: Callable[[str], None] = lambda text: None
) -> tuple[list[InputFile], list[str], list[str]]:
    """The files of a corpus sorted by relative name, the files of its folders that are not taken (of another
    kind), and problems, one line each. `say` hears how far it is where there are many.
    """
    chosen: dict[str, tuple[str, str | None]] = {}
    ignored: list[str] = []
    problems: list[str] = []
    where = f"corpora.{number} ({corpus.name})"
    for pattern in corpus.paths:
        found = _search_far(pattern) if is_remote(pattern) else _search(pattern)
        problems += [f"{where}: {problem}" for problem in found.problems]
        usable = [file for file in found.files if _takes(corpus, file, found.is_folder)]
        unknown = [file for file in found.files if not _takes(corpus, file, found.is_folder)]
        kinds = ".txt, .jsonl or .parquet" if corpus.format == "auto" else f".{corpus.format}"
        if found.is_folder:
            ignored += [file if _is_utf8(file) else repr(file) for file in unknown]
        elif unknown:
            problems.append(
                f"{where}: {unknown[0]}: txt, jsonl or parquet? Its suffix does not tell; set "
                f"corpora.{number}.format"
            )
        if not found.files and not found.problems:
            problems.append(f"{where}: {pattern}: no such file, and no file matches")
        elif found.is_folder and not usable and not found.problems:
            problems.append(
                f"{where}: {pattern}: no {kinds} file (plain, .gz, .zst, .bz2, .xz) in this folder"
            )
        for file in usable:
            name = file if is_remote(file) else os.path.realpath(file)
            chosen.setdefault(name, (file, _relative(file, corpus.root or found.root)))
    named: dict[str, str] = {}
    for path, relative in chosen.values():
        if not _is_utf8(path):
            problems.append(
                f"{where}: {path!r}: the name is not UTF-8, and could not be told in the data set; rename the file"
            )
        elif relative is None:
            problems.append(f"{where}: {path} is not below the root {corpus.root}")
        elif relative in named:
            problems.append(
                f"{where}: {path} and {named[relative]} have the same relative name; set corpora.{number}.root"
            )
        else:
            named[relative] = path
    files: list[InputFile] = []
    for file_or_problem in _described(number, corpus, named, say):
        if isinstance(file_or_problem, str):
            problems.append(f"{where}: {file_or_problem}")
        else:
            files.append(file_or_problem)
    return files, ignored, problems


def _described(
    number: int, corpus: CorpusSection, named: dict[str, str], say: Callable[[str], None]
) -> Iterator[InputFile | str]:
    """The files in the order of their relative names. A storage far away is asked for many at a time, and when it all
    takes long, the user hears of it.
    """
    told = time.monotonic()
    with ThreadPoolExecutor(_ASKED_AT_A_TIME) as pool:
        each = pool.map if any(map(is_remote, named.values())) else map
        names = sorted(named)
        described = each(lambda name: _describe(number, corpus, named[name], name), names)
        for count, found in enumerate(described):
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                say(f"corpus {corpus.name}: looked at {count:,} of {len(names):,} files")
            yield found


def _describe(number: int, corpus: CorpusSection, path: str, relative: str) -> InputFile | str:
    """An input file with what planning needs to know of its inside, or what is wrong with it."""
    by_name, compression = format_of(path)
    kind = by_name if corpus.format == "auto" else corpus.format
    records = corpus.records if kind == "txt" else "line"  # paragraphs are known to txt alone
    try:
        size_bytes, stamp = stamp_of(path)
        file = InputFile(
            number, path, relative, size_bytes, stamp, kind, corpus.text_field, compression, records
        )
        if kind == "parquet":
            with open_to_read(path) as handle:
                footer = read_footer(handle, corpus.text_field)
            if isinstance(footer, Footer):
                return replace(file, groups=footer.rows, text_bytes=footer.text_bytes)
            return file if footer.startswith("damaged") else f"{path}: {footer}"
        if compression == ".zst" and size_bytes >= _SPLIT_BYTES:
            with open_to_read(path) as handle:
                frames = zstd_frames(handle, size_bytes)
            if frames:
                return replace(file, frames=entry_points(frames, BLOCK_BYTES), text_bytes=frames[-1][1])
        return file
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror or error})"


def search_root(path: Path) -> Path:
    """The folder that names are relative to: the folder itself, that of a file, or the one before the first
    wildcard.
    """
    if path.is_dir():
        return path
    while not path.is_file() and glob.has_magic(str(path.parent)):
        path = path.parent
    return path.parent


def _takes(corpus: CorpusSection, file: str, in_folder: bool) -> bool:
    """In a folder the suffix decides; a file that was named itself may be declared to be of a format."""
    by_name = format_of(file)[0]
    if corpus.format == "auto":
        return bool(by_name)
    return by_name == corpus.format if in_folder else True


def _search(pattern: str) -> _Found:
    path = Path(local_path(pattern)).expanduser()
    found = _Found(str(search_root(path)), path.is_dir())
    if found.is_folder:
        candidates: Iterator[Path] = _walk(path, found.problems)
    elif path.is_file():  # also where its name reads like a pattern: wiki[2024].txt
        candidates = iter([path])
    elif glob.has_magic(str(path)):
        candidates = _matching(path, found.problems)
    else:
        candidates = iter([path])
    files = []
    for candidate in candidates:
        if candidate.is_file():
            files.append(_absolute(candidate))
        elif candidate.is_symlink() and not candidate.exists():
            found.problems.append(f"{candidate}: a link to {os.readlink(candidate)}, which does not exist")
    # Of two names for one file the shortest is kept, so a link up the tree does not rename what is below it.
    found.files = [str(file) for file in sorted(files, key=lambda file: (len(file.parts), str(file)))]
    return found


def _search_far(pattern: str) -> _Found:
    """What a URL leads to: a file, everything below a folder, or what a glob matches. Hidden names are left out."""
    found = _Found("")
    try:
        system, name = file_system(pattern)
        found.root = full_url(pattern)
        if glob.has_magic(name):
            names = sorted(system.glob(name))
            before = name[: re.search(r"[*?[]", name).start()]  # type: ignore[union-attr]
            found.root = str(system.unstrip_protocol(before.rpartition("/")[0]))
        elif not pattern.endswith("/") and system.isfile(name):  # a web server has a page for a folder, too
            names, found.root = [name], found.root.rpartition("/")[0]
        else:
            names, found.is_folder = sorted(system.find(name)), True
        for entry in names:
            url = str(system.unstrip_protocol(entry))
            parts = entry.removeprefix(name if found.is_folder else "").strip("/").split("/")
            if ".." in parts:
                found.problems.append(f"{url}: a name that leads out of its folder is not taken")
            elif entry.endswith("/") or any(part.startswith(".") for part in parts):
                continue
            elif found.is_folder or system.isfile(entry):
                found.files.append(url)
    except DataPrepError as error:
        found.problems.append(str(error))
    except Exception as error:  # a client's own exceptions are many
        found.problems.append(f"{pattern}: cannot be listed ({type(error).__name__}: {error})")
    return found


def _matching(pattern: Path, problems: list[str]) -> Iterator[Path]:
    """What a pattern matches; unlike glob.glob it tells of folders that cannot be read, and ends where links
    lead in circles.
    """
    root = search_root(pattern)
    if not root.exists():
        return
    levels = pattern.relative_to(root).parts
    for path in _walk(root, problems, None if "**" in levels else len(levels) - 1):
        if _fits(path.relative_to(root).parts, levels):
            yield path


def _fits(parts: tuple[str, ...], levels: tuple[str, ...]) -> bool:
    """Does a path fit a pattern, level by level? `**` stands for any number of folders, none included."""
    if not levels or not parts:
        return not parts and all(level == "**" for level in levels)
    if levels[0] == "**":
        return _fits(parts, levels[1:]) or _fits(parts[1:], levels)
    return fnmatch.fnmatchcase(parts[0], levels[0]) and _fits(parts[1:], levels[1:])


def _walk(folder: Path, problems: list[str], depth: int | None = None) -> Iterator[Path]:
    """Everything but folders below a folder, hidden names left out; links are followed, but not in circles."""
    above: dict[str, frozenset[tuple[int, int]]] = {}

    def report(error: OSError) -> None:
        problems.append(f"{error.filename}: the folder cannot be read ({error.strerror})")

    for name, folders, files in os.walk(folder, followlinks=True, onerror=report):
        status = os.stat(name)
        here, parents = (status.st_dev, status.st_ino), above.pop(name, frozenset())
        inside = len(Path(name).parts) - len(folder.parts)
        yield from (Path(name, file) for file in sorted(files) if not file.startswith("."))
        if here in parents or (depth is not None and inside >= depth):
            folders.clear()
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        above |= {os.path.join(name, entry): parents | {here} for entry in folders}


def _is_utf8(name: str) -> bool:
    """Names in another encoding come from the system with surrogates, which nothing can write."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _absolute(path: Path) -> Path:
    """Absolute without following links, so that the name stays the one that was found."""
    return Path(os.path.abspath(path))


def _relative(file: str, root: str) -> str | None:
    """The name of a file below its root, None where it is not below. The root may be given by another path to
    the same folder.
    """
    if is_remote(file):
        base = (full_url(root) if is_remote(root) else root).rstrip("/") + "/"
        return file.removeprefix(base) if file.startswith(base) else None
    path, folder = Path(file), _absolute(Path(local_path(root)).expanduser())
    real = Path(os.path.realpath(path.parent), path.name)
    for name, above in ((path, folder), (real, folder.resolve())):
        if name.is_relative_to(above):
            return name.relative_to(above).as_posix()
    return None
