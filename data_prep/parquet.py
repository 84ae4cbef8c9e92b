"""Parquet input: a row group is a block, and a row is a record. Only the text column is read, page after page."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .decompress import is_bomb

if TYPE_CHECKING:
    from .sources import RawBatch

# Arrow decodes so much at a time, by the mean of the row group. Many texts are longer than the mean of their group, or
# come out of a dictionary that is much smaller than they are, so it is never many rows; fewer take longer to decode.
_DECODED_BYTES, _DECODED_ROWS = 4 * 1024**2, 32
_BATCH_BYTES, _BATCH_ROWS = 1024**2, 1024  # of a RawBatch, as large as those of other formats
_PAGE_BUFFER_BYTES = 1024**2


@dataclass(frozen=True)
class Footer:
    """What a parquet file says about itself. rows: of each row group. text_bytes: the text column, unpacked."""

    rows: tuple[int, ...]
    text_bytes: int


def read_footer(handle: BinaryIO, text_field: str) -> Footer | str:
    """The footer, or what is wrong with the file: damaged, or without such a column of text. Raises OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    watched = _Watched(handle)
    try:
        file = pq.ParquetFile(watched)
    except (pa.ArrowException, OSError) as error:
        watched.refuse_other_than_damage(error)
        return f"damaged: {' '.join(str(error).split())[:120]}"
    names = file.schema_arrow.names
    if text_field not in names:
        return f"no column {text_field!r}; there are {', '.join(names)}; set text_field"
    if names.count(text_field) > 1:
        return f"{names.count(text_field)} columns are called {text_field!r}; rename all but one"
    kind = file.schema_arrow.field(text_field).type
    if not _is_text(kind):
        return f"column {text_field!r} is {kind}, not text; set text_field"
    meta = file.metadata
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    column = [meta.schema.column(i).path for i in range(meta.num_columns)].index(text_field)
    text_bytes = sum(group.column(column).total_uncompressed_size for group in groups)
    return Footer(tuple(group.num_rows for group in groups), text_bytes)


def read_rows(
    handle: BinaryIO, text_field: str, first_group: int, stop_group: int | None, max_record_bytes: int
) -> Iterator[RawBatch]:
    """The texts of some row groups as bytes; the offset of a record is its row in the file.

    A page that does not decode costs the rest of its row group, as one lost record; a row group of which so much would
    come that it cannot be text is not unpacked (Arrow unpacks a page as a whole). Raises OSError where the storage
    does not give the bytes: that is no damage, and reading again may go well.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .sources import RawBatch

    watched = _Watched(handle)
    try:
        file = pq.ParquetFile(watched, buffer_size=_PAGE_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        watched.refuse_other_than_damage(error)
        if first_group == 0:
            yield RawBatch(0, 0, np.zeros(1, dtype=np.int64), ["damaged_parquet"])
        return
    counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    for group in range(first_group, len(counts) if stop_group is None else stop_group):
        before, number = sum(counts[:group]), 0
        column = _column(file.metadata.row_group(group), text_field)
        if is_bomb(column.total_compressed_size, column.total_uncompressed_size):
            yield RawBatch(group, 0, np.array([before], dtype=np.int64), ["decompression_bomb"])
            continue
        for lines in _batches(file, watched, group, text_field, max_record_bytes):
            offsets = before + number + np.arange(len(lines), dtype=np.int64)
            yield RawBatch(group, number, offsets, lines)
            number += len(lines)


class _Watched:
    """A file for Arrow that remembers a read that failed: Arrow tells damage and a failing storage by one exception."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self._failure = handle, ""
        self.seek, self.tell, self.seekable = handle.seek, handle.tell, handle.seekable
        self.readable, self.closed = handle.readable, False

    def read(self, size: int = -1) -> bytes:
        try:
            return self._handle.read(size)
        except Exception as error:  # a client's own exceptions are many
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def refuse_other_than_damage(self, error: Exception) -> None:
        """Raises OSError for a read that failed, and the error itself where it is one of this process."""
        import pyarrow as pa

        if self._failure:
            raise OSError(errno.EIO, self._failure) from None
        if isinstance(error, MemoryError | pa.ArrowCancelled):
            raise error


def _batches(
    file: Any, watched: _Watched, group: int, text_field: str, max_record_bytes: int
) -> Iterator[list[bytes | str]]:
    """The records of a row group in portions; how they are parted cannot be seen in the output."""
    import pyarrow as pa

    lines: list[bytes | str] = []
    size_bytes = 0
    rows = _decoded_rows(file.metadata.row_group(group), text_field)
    try:
        for batch in file.iter_batches(rows, row_groups=[group], columns=[text_field], use_threads=False):
            for line in _lines(batch.column(0), max_record_bytes):
                lines.append(line)
                size_bytes += len(line)
                if len(lines) == _BATCH_ROWS or size_bytes >= _BATCH_BYTES:
                    yield lines
                    lines, size_bytes = [], 0
    except (pa.ArrowException, OSError) as error:
        watched.refuse_other_than_damage(error)
        lines.append("damaged_parquet")
    if lines:
        yield lines


def _decoded_rows(group: Any, text_field: str) -> int:
    """How many rows Arrow may decode at a time."""
    size_bytes = _column(group, text_field).total_uncompressed_size
    return max(1, min(_DECODED_ROWS, _DECODED_BYTES * group.num_rows // max(1, size_bytes)))


def _column(group: Any, text_field: str) -> Any:
    """What a row group's metadata says of the column of text."""
    columns = (group.column(i) for i in range(group.num_columns))
    return next(column for column in columns if column.path_in_schema == text_field)


def _lines(column: Any, max_record_bytes: int) -> Iterator[bytes | str]:
    """As bytes, so that text that is not UTF-8 costs one record, not the batch, and one after the other, so that what
    is too large is never taken.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    large = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    column = column.cast(pa.large_binary() if large else pa.binary())
    for value, size_bytes in zip(column, pc.binary_length(column).to_pylist(), strict=True):
        if size_bytes is None:
            yield "field_is_not_text"
        else:
            yield value.as_py() if size_bytes <= max_record_bytes else "record_too_large"


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)
