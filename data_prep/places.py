"""Files here or far away: a path of this machine, or the URL of any storage that fsspec knows (s3://, gs://, …).

Options of a storage (end point, credentials) come from where its client looks for them: the environment
(AWS_ENDPOINT_URL, FSSPEC_S3_…) or fsspec's own configuration files, never from the YAML file.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from .errors import DataPrepError

_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")
_READ_AHEAD_BYTES = 8 * 1024**2


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Is this the URL of a storage other than the local file system?"""
    text = str(path)
    return bool(_URL.match(text)) and not text.startswith(("file://", "local://"))


def place(path: str | os.PathLike[str]) -> Path:
    """A path to work with: absolute and without links here, an object with pathlib's interface for a URL."""
    text = str(path)
    if is_remote(text):
        from upath import UPath

        try:
            return cast(Path, UPath(text))
        except (ImportError, ValueError) as error:
            raise DataPrepError(f"{text}: this storage cannot be used ({error})") from None
    return Path(local_path(text)).expanduser().resolve()


def local_path(path: str) -> str:
    """A path of this machine without the file:// that it may be written with."""
    return re.sub(r"^(file|local)://", "", path)


def lost_with_a_ray_package(paths: dict[str, str | None], folder: str) -> list[str]:
    """A line for each relative path where `folder`, the current one, is the unpacked copy of a Ray job's --working-dir:
    data would be looked for, and lost, there. paths: by configuration key.
    """
    if not any(part.startswith("_ray_pkg_") or part == "working_dir_files" for part in Path(folder).parts):
        return []
    return [
        f"{key}: {path!r} is relative, but a Ray job runs in a temporary copy of its working directory; "
        "give an absolute path that every node sees"
        for key, path in paths.items()
        if path and not is_remote(path) and not os.path.isabs(os.path.expanduser(local_path(path)))
    ]


def full_url(url: str) -> str:
    """A URL as its storage spells it, without a slash at the end, so that two of them can be compared."""
    system, name = file_system(url)
    return str(system.unstrip_protocol(name)).rstrip("/")


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises DataPrepError when its client is not installed."""
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataPrepError(f"{url}: this storage cannot be used ({error})") from None
    return found


def open_to_read(path: str) -> BinaryIO:
    """Open a file for reading in order or by seeking. Raises OSError."""
    if not is_remote(path):
        return open(path, "rb")
    system, name = file_system(path)
    ahead = {"block_size": _READ_AHEAD_BYTES, "cache_type": "readahead"}
    return cast(BinaryIO, _client_errors(path, system.open, name, "rb", **ahead))


def _client_errors(path: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a function of a storage's client returns; its own exceptions, which are many, become OSError."""
    try:
        return function(*arguments, **options)
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", path) from None


def stamp_of(path: str, handle: BinaryIO | None = None) -> tuple[int, str]:
    """(size in bytes, what changes when the content does): the time of modification in nanoseconds here, the ETag or
    what else the storage tells there. Raises OSError.
    """
    if not is_remote(path):
        status = os.stat(path) if handle is None else os.fstat(handle.fileno())
        return status.st_size, str(status.st_mtime_ns)
    system, name = file_system(path)
    system.invalidate_cache()
    return stamp_of_info(_client_errors(path, system.info, name))


def stamp_of_info(info: dict[str, Any]) -> tuple[int, str]:
    """The same from an entry of an fsspec listing."""
    for key in (
        "ETag",
        "etag",
        "md5Hash",
        "content_md5",
        "LastModified",
        "last_modified",
        "mtime",
        "updated",
    ):
        if info.get(key):
            return int(info["size"]), str(info[key]).strip('"')
    return int(info["size"]), ""


def read_range(path: Path, offset: int = 0, length: int | None = None) -> bytes:
    """Bytes of a file or of a range of it, fewer where it ends before. Raises OSError."""
    if is_remote(path):
        # All of an object is asked for without a range: of an empty one there is none, and S3 refuses.
        start, stop = (offset or None, None) if length is None else (offset, offset + length)
        return bytes(path.fs.cat_file(path.path, start=start, end=stop))  # type: ignore[attr-defined]
    with path.open("rb") as file:
        return os.pread(file.fileno(), length, offset) if length is not None else file.read()
