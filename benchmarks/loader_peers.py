"""The peers of benchmarks/loader.py: loader(workers, position) gives batches [BATCH, L] int64 of the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch.utils.data import DataLoader, Dataset

L, BATCH, SHARD_ROWS = 512, 32, 8192
"""Tokens a row, rows a batch, rows a shard (and a piece of work of litdata's)."""


def decode(sample: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(zstandard.decompress(sample["tokens.zst"]), "<u2").reshape(-1, L)


def in_batches(blocks: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
    for block in blocks:
        for start in range(0, len(block), BATCH):
            yield torch.from_numpy(block[start : start + BATCH].astype(np.int64))


def webdataset_loader(folder: Path) -> Callable[[int, int], Iterator[Any]]:
    """Plain webdataset on our very shards. It has no position: what was read is read again and dropped."""
    import webdataset

    urls = [str(file) for file in sorted((folder / "train").glob("*.tar"))]

    def loader(workers: int, position: int) -> Iterator[Any]:
        data = (
            webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).map(decode).compose(in_batches)
        )
        batches = iter(DataLoader(data, batch_size=None, num_workers=workers))
        for _ in range(position // BATCH):
            next(batches)
        return batches

    return loader


def _rows_of(file: Path, first: int, last: int) -> Iterator[torch.Tensor]:
    for row in np.load(file, mmap_mode="r")[first:last]:
        yield torch.from_numpy(row.astype(np.int64))


def litdata_loader(folder: Path, file: Path, rows: int) -> Callable[[int, int], Iterator[Any]]:
    from functools import partial

    import litdata

    item = litdata.TokensLoader(block_size=L)
    cuts = list(range(0, rows, SHARD_ROWS))
    litdata.optimize(
        fn=partial(_call, file), inputs=[(cut, min(cut + SHARD_ROWS, rows)) for cut in cuts], output_dir=str(folder),
        chunk_bytes="64MB", item_loader=item, num_workers=1, keep_data_ordered=True,
    )  # fmt: skip
    torch.multiprocessing.set_start_method("fork", force=True)  # it sets spawn, which starts workers slowly

    def loader(workers: int, position: int) -> Iterator[Any]:
        data = litdata.StreamingDataset(
            str(folder), item_loader=litdata.TokensLoader(block_size=L), shuffle=False
        )
        batches = iter(litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=workers))
        # A state can be taken from a running loader only, and counts what workers fetched; so it runs to the position.
        for _ in range(position // BATCH):
            next(batches)
        return batches

    return loader


def _call(file: Path, span: tuple[int, int]) -> Iterator[torch.Tensor]:
    yield from _rows_of(file, *span)


class Mapped(Dataset):
    """Rows of one memory-mapped file, as a map-style data set."""

    def __init__(self, file: Path):
        self.rows = np.load(file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[row].astype(np.int64))


def torchdata_loader(file: Path) -> Callable[[int, int], Iterator[Any]]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    states: dict[tuple[int, int], Any] = {}

    def loader(workers: int, position: int) -> Iterator[Any]:
        def fresh() -> Any:
            return StatefulDataLoader(Mapped(file), batch_size=BATCH, num_workers=workers)

        if position and (workers, position) not in states:
            running = fresh()
            iterator = iter(running)
            for _ in range(position // BATCH):
                next(iterator)
            states[workers, position] = running.state_dict()
        batches = fresh()
        if position:
            batches.load_state_dict(states[workers, position])
        return iter(batches)

    return loader


def datasets_loader(folder: Path, tokens_NL: np.ndarray) -> Callable[[int, int], Iterator[Any]]:
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    flat = pyarrow.array(tokens_NL.reshape(-1))
    table = pyarrow.table({"tokens": pyarrow.FixedSizeListArray.from_arrays(flat, L)})
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(folder), num_shards=4)

    def loader(workers: int, position: int) -> Iterator[Any]:
        data = datasets.load_from_disk(str(folder)).to_iterable_dataset(num_shards=4).with_format("torch")
        if position:
            data = data.skip(position)
        for batch in DataLoader(data.batch(BATCH), batch_size=None, num_workers=workers):
            yield batch["tokens"].long()

    return loader
