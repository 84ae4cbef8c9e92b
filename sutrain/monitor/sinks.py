"""TensorBoard and Weights & Biases, for those who have them: the same numbers, through their own libraries.

Neither is a dependency. Whole-model numbers go there on every step, tables of layers as quantiles over depth.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .statistics import GroupTable

NAMES = ("median", "max")
_QUANTILES = (0.5, 1.0)


class SinkError(ValueError):
    """The library for a sink is missing; the message says how to get it."""


class Sink(Protocol):
    """Takes numbers by name; called from one thread."""

    def step(self, record: Mapping[str, Any], table: GroupTable) -> None:
        """A finished training step."""

    def values(self, step: int, record: Mapping[str, Any]) -> None:
        """An evaluation or a probe."""

    def close(self) -> None:
        """Write what is still waiting."""


def open_sinks(names: Sequence[str], run_dir: Path, resumed_from: int | None = None) -> list[Sink]:
    """The sinks of `monitor.also`; `resumed_from` is the step of the checkpoint that the run goes on from, None at a
    start. Raises SinkError."""
    kinds: dict[str, Callable[[Path, int | None], Sink]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
    }
    return [kinds[name](run_dir, resumed_from) for name in dict.fromkeys(names)]


class TensorBoard:
    """Event files in RUN_DIR/tensorboard: `tensorboard --logdir RUN_DIR`. Steps that are done again replace those of
    before."""

    def __init__(self, run_dir: Path, resumed_from: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SinkError(
                "monitor.also: tensorboard is not installed; pip install tensorboard, or leave it out"
            ) from None
        again = None if resumed_from is None else resumed_from + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=again)

    def step(self, record: Mapping[str, Any], table: GroupTable) -> None:
        self.values(record["step"], {**record, **table.global_norms, **dict(_over_depth(table))})

    def values(self, step: int, record: Mapping[str, Any]) -> None:
        for name, value in _flat(record):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project that WANDB_PROJECT names; WANDB_MODE=offline keeps it in RUN_DIR/wandb. Its id is kept in
    RUN_DIR/wandb_id, so that a run that goes on is the same run there."""

    def __init__(self, run_dir: Path, resumed_from: int | None) -> None:
        try:
            import wandb
        except ImportError:
            raise SinkError(
                "monitor.also: wandb is not installed; pip install wandb, or leave it out"
            ) from None
        kept = run_dir / "wandb_id"
        if resumed_from is None or not kept.exists():
            kept.write_text(secrets.token_hex(8), encoding="utf-8")
        name = kept.read_text(encoding="utf-8")
        self._run = wandb.init(dir=str(run_dir), name=run_dir.name, id=name, resume="allow")

    def step(self, record: Mapping[str, Any], table: GroupTable) -> None:
        self.values(record["step"], {**record, **table.global_norms, **dict(_over_depth(table))})

    def values(self, step: int, record: Mapping[str, Any]) -> None:
        self._run.log(dict(_flat(record)) | {"step": step})

    def close(self) -> None:
        self._run.finish()


def _over_depth(table: GroupTable) -> Iterator[tuple[str, float]]:
    for column in table.known_columns():
        for part in table.groups.layer_groups:
            for name, value in zip(NAMES, table.over_depth(column, part, _QUANTILES), strict=True):
                yield f"{column}/{part}/{name}", float(value)


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers as they are, lists by layer as NAME/0, NAME/1 …, objects as NAME/KEY."""
    for name, value in record.items():
        if isinstance(value, bool | int | float):
            yield name, float(value)
        elif isinstance(value, Mapping):
            yield from ((f"{name}/{key}", float(x)) for key, x in value.items() if isinstance(x, int | float))
        elif isinstance(value, list | tuple):
            yield from ((f"{name}/{i}", float(x)) for i, x in enumerate(value) if isinstance(x, int | float))
