"""Acting on what is seen, for those who ask for it: refuse an update that stands out too far, stop when nothing works.

Size is limited inside the optimizers (clipping, RMS(U), trust ratio). What is refused here is an update whose loss or
gradient says that the batch is not like the others. A refused update changes nothing but the position: no weight, no
optimizer state, no counter of updates; its samples are consumed, and metrics.jsonl names them.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .spikes import WINDOW_STEPS, RollingHistory, safe_log

QUANTITIES = ("loss", "grad_norm")
NOTHING_REFUSED: dict[str, Any] = {"refused": 0, "values": []}
"""The state of a gate that has seen nothing, for checkpoints from before there was one."""


class TrainingStoppedError(ValueError):
    """Training was stopped on purpose; the message says why and where the dump lies."""


class StepGate:
    """Judges loss and gradient norm of each step, in logs, against their own last steps (see spikes.py).

    `sigmas` robust standard deviations above the level of either refuse the update; None never does. Both numbers
    come out of reductions over all ranks; the verdict is rank 0's, on every rank. What is refused is
    remembered like the rest, so a lasting change of level is refused for about ten steps, not for ever.
    """

    def __init__(self, sigmas: float | None, device: torch.device | str = "cpu") -> None:
        self.sigmas, self._device = sigmas, device
        self.refused = 0
        self.verdict: dict[str, float] | None = None
        """Of the last step: why it was refused, None if it was not."""
        self.loss: Tensor | float = math.nan
        """To be set before the optimizer steps."""
        self._history = RollingHistory(len(QUANTITIES), noise_every_steps=1)
        self._values: deque[list[float]] = deque(maxlen=2 * WINDOW_STEPS)

    def __call__(self, grad_norm: float) -> bool:
        """May the update be made? The optimizer asks, once a step, on every rank."""
        self.verdict = None
        if self.sigmas is None:
            return True
        values = [float(self.loss), grad_norm]
        _, sigmas_N = self._history.compare(safe_log(np.array(values)))
        self._remember(values)
        # No norm and no loss at all is as far off as can be.
        furthest = (
            math.inf if not np.isfinite(values).all() else float(np.nan_to_num(sigmas_N, nan=0.0).max())
        )
        if self._agree(furthest <= self.sigmas):
            return True
        self.refused += 1
        self.verdict = {"loss": values[0], "grad_norm": grad_norm, "sigmas": furthest}
        return False

    def _agree(self, verdict: bool) -> bool:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return verdict
        decision = torch.tensor([int(verdict)], device=self._device)
        dist.broadcast(decision, 0)
        return bool(decision)

    def as_record(self, samples_consumed: int, samples: int) -> dict[str, Any]:
        """{"refused": why, and which samples} for metrics.jsonl after a refused step, else {}."""
        if self.verdict is None:
            return {}
        return {"refused": {**self.verdict, "first_sample": samples_consumed - samples, "samples": samples}}

    def _remember(self, values: list[float]) -> None:
        self._values.append(values)
        self._history.add(safe_log(np.array(values)))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run refuses what the uninterrupted one would have refused."""
        values = [[x if math.isfinite(x) else None for x in pair] for pair in self._values]
        return {"refused": self.refused, "values": values}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over `state()` of the run that goes on."""
        self.refused = int(state["refused"])
        for pair in state["values"]:
            self._remember([math.nan if x is None else x for x in pair])


class BrokenStreak:
    """Counts steps in a row without a finite loss or without an update, which may have been skipped or refused; `limit`
    of them end the run (None: never)."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.length = limit, 0
        self.good_step: int | None = None
        """The last step before the newest row whose weights gave a finite loss; None where nobody knows any more."""
        self.without_update = 0
        """Steps so far that made no update; a run that goes on begins with those of before."""

    def stop_after(
        self, record: Mapping[str, Any], dump: Callable[[Mapping[str, Any], int], str] | None
    ) -> None:
        """Take a step's record. Raises TrainingStoppedError, on all ranks alike, when it is time to stop; `dump`
        (rank 0) is given the record and the last step whose weights are known to be good, writes what is known and
        says where."""
        without_update = record["skipped_steps_total"] + record["refused_steps_total"]
        broken = without_update > self.without_update or not math.isfinite(record["loss"])
        self.without_update = without_update
        if broken and not self.length:  # the weights of step k are seen by the loss of step k + 1
            self.good_step = record["step"] - (1 if math.isfinite(record["loss"]) else 2)
        self.length = self.length + 1 if broken else 0
        if self.limit is not None and self.length >= self.limit:
            good = self.good_step if self.good_step is not None else record["step"] - self.length - 1
            where = f"; {dump(record, good)} says what is known" if dump is not None else ""
            raise TrainingStoppedError(
                f"stopped after step {record['step']}: {self.length} step(s) in a row without a finite loss or "
                f"without an update (acting.stop_after_broken_steps){where}"
            )


def write_dump(
    run_dir: Path, step: int, record: Mapping[str, Any], layers: Mapping[str, list], checkpoint: Path | None
) -> Path:
    """What is needed to look into a run that was stopped: its last step, the samples of it, every layer's numbers.

    `python -m sutrain.replay --run RUN_DIR --step STEP` prints the documents. Returns the file.
    """
    path = run_dir / f"dump-step-{step:08d}.json"
    content = {
        "time_seconds": time.time(),
        "step": step,
        "last_step": {key: _readable(value) for key, value in record.items()},
        "layers": {name: [_readable(x) for x in values] for name, values in layers.items()},
        "last_good_checkpoint": str(checkpoint) if checkpoint else None,
        "documents": f"python -m sutrain.replay --run {run_dir} --step {step}",
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def _readable(value: Any) -> Any:
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
