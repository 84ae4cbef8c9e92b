"""Parquet input: a row group is a block, and a row is a record. Only the text column is read, page after page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from .sources import RawBatch

_BATCH_ROWS = 1024
_PAGE_BUFFER_BYTES = 1024**2


@dataclass(frozen=True)
class Footer:
    """What a parquet file says about itself. rows: of each row group. text_bytes: the text column, unpacked."""

    rows: tuple[int, ...]
    text_bytes: int


def read_footer(handle: BinaryIO, text_field: str) -> Footer | str:
    """The footer, or what is wrong with the file: damaged, or without such a column of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(handle)
    except (pa.ArrowException, OSError) as error:
        return f"damaged: {' '.join(str(error).split())[:120]}"
    names = file.schema_arrow.names
    if text_field not in names:
        return f"no column {text_field!r}; there are {', '.join(names)}; set text_field"
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

    A page that does not decode costs the rest of its row group, as one lost record.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .sources import RawBatch

    try:
        file = pq.ParquetFile(handle, buffer_size=_PAGE_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError):
        if first_group == 0:
            yield RawBatch(0, 0, np.zeros(1, dtype=np.int64), ["damaged_parquet"])
        return
    counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    for group in range(first_group, len(counts) if stop_group is None else stop_group):
        before, number = sum(counts[:group]), 0
        try:
            for batch in file.iter_batches(
                _BATCH_ROWS, row_groups=[group], columns=[text_field], use_threads=False
            ):
                lines = [_line(value, max_record_bytes) for value in _values(batch.column(0))]
                offsets = before + number + np.arange(len(lines), dtype=np.int64)
                yield RawBatch(group, number, offsets, lines)
                number += len(lines)
        except (pa.ArrowException, OSError):
            yield RawBatch(group, number, np.array([before + number], dtype=np.int64), ["damaged_parquet"])


def _values(column: Any) -> list[bytes | None]:
    """As bytes, so that text that is not UTF-8 costs one record, not the batch."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    large = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    values: list[bytes | None] = column.cast(pa.large_binary() if large else pa.binary()).to_pylist()
    return values


def _line(value: bytes | None, max_record_bytes: int) -> bytes | str:
    if value is None:
        return "field_is_not_text"
    return value if len(value) <= max_record_bytes else "record_too_large"


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests)
