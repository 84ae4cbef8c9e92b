"""The input files of a corpus: found, named and told apart, with nothing left out silently.

Links are followed. A file keeps the name, and with it the kind and compression, under which it was found, also
where that name is a link into a store of blobs; what a link leads to only tells that two names are one file.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .config import CorpusSection
from .sources import InputFile, format_of


@dataclass
class _Found:
    """What one entry of `paths` leads to: files with the folder that their names are relative to."""

    files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def list_corpus(number: int, corpus: CorpusSection) -> tuple[list[InputFile], list[str], list[str]]:
    """The files of a corpus sorted by relative name, the files of its folders that are not taken (of another
    kind), and problems, one line each.
    """
    chosen: dict[str, tuple[Path, Path]] = {}
    ignored: list[str] = []
    problems: list[str] = []
    where = f"corpora.{number} ({corpus.name})"
    for pattern in corpus.paths:
        path = Path(pattern).expanduser()
        is_folder = path.is_dir()
        found = _search(path, is_folder)
        problems += [f"{where}: {problem}" for problem in found.problems]
        usable = [file for file in found.files if _takes(corpus, file, is_folder)]
        unknown = [file for file in found.files if not _takes(corpus, file, is_folder)]
        kinds = ".txt or .jsonl" if corpus.format == "auto" else f".{corpus.format}"
        if is_folder:
            ignored += map(str, unknown)
        elif unknown:
            problems.append(
                f"{where}: {unknown[0]}: txt or jsonl? Its suffix does not tell; set corpora.{number}.format"
            )
        if not found.files and not found.problems:
            problems.append(f"{where}: {pattern}: no such file, and no file matches")
        elif is_folder and not usable and not found.problems:
            problems.append(
                f"{where}: {pattern}: no {kinds} file (plain, .gz, .zst, .bz2, .xz) in this folder"
            )
        root = Path(corpus.root).expanduser() if corpus.root else search_root(path)
        for file in map(_absolute, usable):
            chosen.setdefault(os.path.realpath(file), (file, _absolute(root)))
    files: dict[str, InputFile] = {}
    for path, root in chosen.values():
        relative = _relative(path, root)
        if relative is None:
            problems.append(f"{where}: {path} is not below the root {root}")
        elif relative in files:
            problems.append(
                f"{where}: {path} and {files[relative].path} have the same relative name; set "
                f"corpora.{number}.root"
            )
        else:
            status = path.stat()
            kind, compression = _kind(path, corpus)
            files[relative] = InputFile(
                number,
                str(path),
                relative,
                status.st_size,
                status.st_mtime_ns,
                kind,
                corpus.text_field,
                compression,
            )
    return [files[name] for name in sorted(files)], ignored, problems


def search_root(path: Path) -> Path:
    """The folder that names are relative to: the folder itself, that of a file, or the one before the first
    wildcard.
    """
    if path.is_dir():
        return path
    while not path.is_file() and glob.has_magic(str(path.parent)):
        path = path.parent
    return path.parent


def _takes(corpus: CorpusSection, file: Path, in_folder: bool) -> bool:
    """In a folder the suffix decides; a file that was named itself may be declared to be of a format."""
    by_name = format_of(file)[0]
    if corpus.format == "auto":
        return bool(by_name)
    return by_name == corpus.format if in_folder else True


def _kind(path: Path, corpus: CorpusSection) -> tuple[str, str]:
    by_name, compression = format_of(path)
    return (by_name if corpus.format == "auto" else corpus.format), compression


def _search(path: Path, is_folder: bool) -> _Found:
    found = _Found()
    if is_folder:
        candidates: Iterator[Path] = _walk(path, found.problems)
    elif path.is_file():  # also where its name reads like a pattern: wiki[2024].txt
        candidates = iter([path])
    elif glob.has_magic(str(path)):
        candidates = _matching(path, found.problems)
    else:
        candidates = iter([path])
    for candidate in candidates:
        if candidate.is_file():
            found.files.append(candidate)
        elif candidate.is_symlink() and not candidate.exists():
            found.problems.append(f"{candidate}: a link to {os.readlink(candidate)}, which does not exist")
    # Of two names for one file the shortest is kept, so a link up the tree does not rename what is below it.
    found.files.sort(key=lambda file: (len(file.parts), str(file)))
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


def _absolute(path: Path) -> Path:
    """Absolute without following links, so that the name stays the one that was found."""
    return Path(os.path.abspath(path))


def _relative(path: Path, root: Path) -> str | None:
    """The name of a file below its root, None where it is not below. The root may be given by another path to
    the same folder.
    """
    for file, folder in ((path, root), (Path(os.path.realpath(path.parent), path.name), root.resolve())):
        if file.is_relative_to(folder):
            return file.relative_to(folder).as_posix()
    return None
