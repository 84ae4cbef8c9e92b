"""Output to a URL (s3://bucket/folder): shards go there as they are made, small files at the end, the manifest last.

What a run needs to find again, its plan, its lease, its progress, stays in a folder below work_dir, which every node
sees as a file system. The URL holds a data set only from the moment its manifest lies there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import DataPrepError
from .files import check_fence, write_bytes
from .places import is_remote, place
from .shards import SPLITS

_FIRST, _LAST = (
    ("tokenizer", "token_counts.bin", "quarantine.jsonl", "plan.json", "run.json"),
    "manifest.json",
)


def publish(state: Path, url: str) -> None:
    """Copy what lies in the state folder of a finished run to the URL, the manifest last. Does nothing where the output
    is a folder, or is there already.
    """
    if not is_remote(url):
        return
    target, manifest = place(url), (state / _LAST).read_bytes()
    if _bytes_or_none(target / _LAST) == manifest:
        return
    for name in _FIRST:
        source = state / name
        for path in sorted(source.iterdir()) if source.is_dir() else [source]:
            if path.is_file():
                write_bytes(target / path.relative_to(state).as_posix(), path.read_bytes())
    write_bytes(target / _LAST, manifest)


def refuse_unreachable(url: str) -> None:
    """Raises DataPrepError when the storage of a URL does not answer, or not to us. Writes nothing."""
    if not is_remote(url):
        return
    try:
        _exists(place(url) / _LAST)
    except DataPrepError:
        raise
    except Exception as error:  # a client's own exceptions are many
        raise DataPrepError(
            f"output_dir: {url}: cannot be reached ({type(error).__name__}: {' '.join(str(error).split())}); "
            "credentials and end point come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …)"
        ) from None


def refuse_strangers(url: str, saved: Any) -> None:
    """Raises DataPrepError when something lies at the URL that no run with this work_dir wrote, or when it is out of
    reach.
    """
    refuse_unreachable(url)
    if not is_remote(url) or saved is not None:
        return
    for name in (_LAST, *SPLITS):
        if _exists(place(url) / name):
            raise DataPrepError(
                f"{url}: holds {name}, which no run with this work_dir wrote; take another output_dir, give the "
                "work_dir it was begun with, or remove it"
            )


def clear_far(url: str) -> None:
    """Remove what runs wrote to the URL, the manifest first."""
    if not is_remote(url):
        return
    check_fence()
    target = place(url)
    for name in (_LAST, *_FIRST[1:]):
        (target / name).unlink(missing_ok=True)
    for folder in ("tokenizer", *SPLITS):
        for path in (target / folder).iterdir() if _exists(target / folder) else ():
            if path.is_file():
                path.unlink()


def _exists(path: Path) -> bool:
    forget(path)
    return path.exists()


def _bytes_or_none(path: Path) -> bytes | None:
    forget(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def forget(path: Any) -> None:
    """Drop what a client remembers of its listings: others write there too."""
    if hasattr(path, "fs"):
        path.fs.invalidate_cache()
