"""From the optimizer's sums of squares per tensor to norms per layer and part.

The optimizer sums, over the slices that ZeRO gave to the ranks, the squares of every tensor's weight,
gradient and update (what the step truly added to the fp32 master weight). Here those sums, equal on all
ranks, become the numbers people look at. The update is the leading indicator of trouble: DeepNet bounds the
change of the model, not its gradient (arXiv 2203.00555; kexue.fm/archives/8978), and in practice update norms
jump before the loss does while gradient norms follow after it (marin-community/marin#1368).

Some optimizers fix the size of the update relative to the weight (LAMB by construction, AdaFactor nearly, by its
clip). What tells there is what they did to get it: the trust ratio, the RMS of the direction before the clip, the
share that was clipped, and the update over learning rate times weight.

Shapes: T tensors, S statistics of a tensor, G groups = (layer, part) pairs, N layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

PARTS = ("embedding", "mixer", "feed_forward", "norm", "head")
COLUMNS = ("grad_norm", "weight_norm", "update_norm", "update_ratio")
OPTIMIZER_COLUMNS = ("direction_rms", "clipped_share", "trust_ratio")
"""What only some optimizers have; NaN for the others."""
DEAD = 1e-3
"""A layer whose update ÷ weight is below this share of the median layer's stands still."""
SQUARE_SUMS = ("grad_square_sum", "weight_square_sum", "update_square_sum")
_HEAD = {"head", "transform", "head_bias"}
"""Modules of the head, and its bias, which stands in no module (masked_lm.py)."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


def layer_and_part(name: str) -> tuple[str, str] | None:
    """The group of a parameter: `("3", "mixer")` of `encoder.layers.3.mixer.query.weight`.

    Tensors outside the layers have the layer "" (to Prometheus an empty label is no label, so `layer!=""`
    selects the layers). A parameter of a norm, wherever it stands, is a "norm"; the map ahead of BERT's prediction and
    the bias behind it are of the head. None for a name that fits no part.
    """
    inside_layer = _LAYER.search(name)
    layer, path = inside_layer.groups() if inside_layer else ("", name)
    modules = path.split(".")[:-1]
    if modules and modules[-1].endswith("norm"):
        return layer, "norm"
    if inside_layer:
        part = modules[0] if modules else path.removesuffix("_scale")  # rezero's factors of the branches
        return (layer, part) if part in ("mixer", "feed_forward") else None
    if "embeddings" in modules:
        return "", "embedding"
    return ("", "head") if not _HEAD.isdisjoint((*modules, path)) else None


@dataclass(frozen=True)
class TensorGroups:
    """Which (layer, part) every tensor of the model belongs to.

    `names` are parameter names and `shapes` their whole (unsharded) shapes, in the order of the rows of the
    optimizer's statistics. Raises ValueError, naming all culprits, for names that fit no part or for a number
    of shapes that is not the number of names.
    """

    names: Sequence[str]
    shapes: Sequence[Sequence[int]]
    keys: list[tuple[str, str]] = field(init=False)
    group_of_T: np.ndarray = field(init=False)
    numel_T: np.ndarray = field(init=False)
    numel_G: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ValueError(f"TensorGroups: {len(self.names)} names but {len(self.shapes)} shapes")
        found = [layer_and_part(name) for name in self.names]
        lost = [name for name, key in zip(self.names, found, strict=True) if key is None]
        if lost:
            raise ValueError(
                f"{len(lost)} parameter(s) fit no part of {', '.join(PARTS)}: {', '.join(lost)}; "
                "teach layer_and_part in sutrain/monitor/statistics.py where they belong"
            )
        pairs = [key for key in found if key is not None]
        keys = sorted(set(pairs), key=_reading_order)
        position = {key: i for i, key in enumerate(keys)}
        group_of_T = np.array([position[key] for key in pairs], dtype=np.int64)
        numel_T = np.array([math.prod(shape) for shape in self.shapes], dtype=np.float64)
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "group_of_T", group_of_T)
        object.__setattr__(self, "numel_T", numel_T)
        object.__setattr__(self, "numel_G", np.bincount(group_of_T, numel_T, len(keys)))

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def layers(self) -> int:
        """N, one more than the largest layer number (0 for a model without layers)."""
        return 1 + max((int(layer) for layer, _ in self.keys if layer), default=-1)

    @cached_property
    def layer_groups(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """part -> (indices into the groups, layer numbers), layers ascending; other tensors left out."""
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for part in PARTS:
            rows = [(g, int(layer)) for g, (layer, p) in enumerate(self.keys) if p == part and layer]
            if rows:
                indices, numbers = zip(*rows, strict=True)
                found[part] = np.array(indices), np.array(numbers)
        return found

    def table(
        self, statistics_TS: Any, columns: Sequence[str], learning_rate: float = math.nan
    ) -> GroupTable:
        """Norms of every group from sums of squares of every tensor.

        `statistics_TS` is a torch tensor (any device) or an array, [T, S]; `columns` names its columns
        (`sutrain.optim.STATISTICS`) and must hold `grad_square_sum`, `weight_square_sum` and
        `update_square_sum`. `update_rms` (before the clip), `clip_factor` and `trust_ratio` are taken where they
        are; others are ignored. `learning_rate` is that of the step. A NaN (not measured, or a gradient that was not
        finite) makes the norms of its group NaN and no others. Raises ValueError for a wrong shape or a missing column.
        """
        if hasattr(statistics_TS, "detach"):
            statistics_TS = statistics_TS.detach().to("cpu").numpy()
        sums_TS = np.asarray(statistics_TS, dtype=np.float64)
        if sums_TS.shape != (len(self.names), len(columns)):
            expected = f"[{len(self.names)} tensors, {len(columns)} columns]"
            raise ValueError(f"statistics have shape {list(sums_TS.shape)}, expected {expected}")
        missing = [name for name in SQUARE_SUMS if name not in columns]
        if missing:
            raise ValueError(
                f"statistics lack the column(s) {', '.join(missing)}; they have {', '.join(columns)}"
            )
        squares = {
            name: np.bincount(self.group_of_T, sums_TS[:, list(columns).index(name)], len(self.keys))
            for name in SQUARE_SUMS
        }
        own = {
            "direction_rms": np.sqrt(self._mean(sums_TS, columns, "update_rms", np.square)),
            "clipped_share": self._mean(sums_TS, columns, "clip_factor", _below_one),
            "trust_ratio": np.exp(self._mean(sums_TS, columns, "trust_ratio", _log)),
        }
        return GroupTable(
            self,
            squares["grad_square_sum"],
            squares["weight_square_sum"],
            squares["update_square_sum"],
            learning_rate,
            own,
        )

    def _mean(self, sums_TS: np.ndarray, columns: Sequence[str], name: str, function: Any) -> np.ndarray:
        """Mean of function(column) over the tensors of each group, weighted by elements; tensors with NaN are
        left out, and a group of nothing else is NaN."""
        if name not in columns:
            return np.full(len(self.keys), np.nan)
        values_T = function(sums_TS[:, list(columns).index(name)])
        weights_T = np.where(np.isfinite(values_T), self.numel_T, 0.0)
        totals = np.bincount(self.group_of_T, np.nan_to_num(values_T, posinf=0.0) * weights_T, len(self.keys))
        return _ratio(totals, np.bincount(self.group_of_T, weights_T, len(self.keys)))


def _reading_order(key: tuple[str, str]) -> tuple[int, int, int]:
    """Embeddings first, then the layers from the input up, then what follows them."""
    layer, part = key
    if layer:
        return 1, int(layer), PARTS.index(part)
    return (0 if part == "embedding" else 2), 0, PARTS.index(part)


@dataclass(frozen=True)
class GroupTable:
    """The norms of one step, arrays [G] in the order of `groups.keys`."""

    groups: TensorGroups
    grad_square_sum: np.ndarray
    weight_square_sum: np.ndarray
    update_square_sum: np.ndarray
    learning_rate: float = math.nan
    own: Mapping[str, np.ndarray] = field(default_factory=dict)
    """OPTIMIZER_COLUMNS, [G] each."""

    @cached_property
    def grad_norm(self) -> np.ndarray:
        """L2 norm of the gradient."""
        return np.sqrt(self.grad_square_sum)

    @cached_property
    def weight_norm(self) -> np.ndarray:
        """L2 norm of the weights."""
        return np.sqrt(self.weight_square_sum)

    @cached_property
    def update_norm(self) -> np.ndarray:
        """L2 norm of what the step added to the weights."""
        return np.sqrt(self.update_square_sum)

    @cached_property
    def update_ratio(self) -> np.ndarray:
        """Update norm over weight norm; NaN where the weights are all zero."""
        return _ratio(self.update_norm, self.weight_norm)

    @cached_property
    def update_ratio_per_rate(self) -> np.ndarray:
        """Update norm over learning rate times weight norm: what the schedule leaves out; NaN at rate 0."""
        return self.update_ratio / (self.learning_rate or math.nan)

    @property
    def direction_rms(self) -> np.ndarray:
        """RMS of the update before clip and learning rate (AdaFactor's RMS(U)), over the elements of a group."""
        return self._own("direction_rms")

    @property
    def clipped_share(self) -> np.ndarray:
        """Share of a group's elements in tensors whose update was clipped (AdaFactor)."""
        return self._own("clipped_share")

    @property
    def trust_ratio(self) -> np.ndarray:
        """LAMB's trust ratio: geometric mean over a group's tensors, weighted by elements."""
        return self._own("trust_ratio")

    def _own(self, column: str) -> np.ndarray:
        known = self.own.get(column)
        return np.full(len(self.groups), np.nan) if known is None else known

    def dead_layers(self, part: str) -> int:
        """Layers of a part that stand still while the others move: update ÷ weight below DEAD of the median.

        A tensor of zeros that stays zero has no ratio and counts as dead when its update is 0 too.
        """
        indices, _ = self.groups.layer_groups[part]
        ratio, update = self.update_ratio[indices], self.update_norm[indices]
        known = ratio[np.isfinite(ratio)]
        middle = float(np.median(known)) if len(known) else 0.0
        return int(((ratio < DEAD * middle) | (np.isnan(ratio) & (update == 0))).sum()) if middle > 0 else 0

    def root_mean_square(self, column: str) -> np.ndarray:
        """A norm per element: `column` is grad_norm, weight_norm or update_norm; comparable across groups."""
        return getattr(self, column) / np.sqrt(self.groups.numel_G)

    @cached_property
    def global_norms(self) -> dict[str, float]:
        """`grad_norm`, `weight_norm`, `update_norm`, `update_ratio` of the whole model."""
        grad, weight, update = (
            math.sqrt(float(x.sum()))
            for x in (self.grad_square_sum, self.weight_square_sum, self.update_square_sum)
        )
        return {
            "grad_norm": grad, "weight_norm": weight, "update_norm": update,
            "update_ratio": update / weight if weight > 0 else math.nan,
        }  # fmt: skip

    def over_depth(self, column: str, part: str, quantiles: Sequence[float] = (0, 0.5, 1)) -> np.ndarray:
        """Quantiles (default minimum, median, maximum) over a part's layers; NaN if nothing is known."""
        indices, _ = self.groups.layer_groups[part]
        values = getattr(self, column)[indices]
        values = values[np.isfinite(values)]
        return np.quantile(values, quantiles) if len(values) else np.full(len(quantiles), np.nan)

    def depth_slope(self, part: str, column: str = "update_norm") -> float:
        """Least-squares slope of log(column) against log(layer + 1) over the layers of one part.

        0: all layers move alike; +1: the last of N layers moves N times as much as the first.  NaN below two
        layers with a finite, positive value.
        """
        indices, layers = self.groups.layer_groups[part]
        values = getattr(self, column)[indices]
        good = np.isfinite(values) & (values > 0)
        if good.sum() < 2:
            return math.nan
        x, y = np.log(layers[good] + 1.0), np.log(values[good])
        x -= x.mean()
        return float((x * (y - y.mean())).sum() / (x * x).sum())

    def rows(self) -> Iterator[tuple[str, str, dict[str, float]]]:
        """(layer, part, {column: value}) of every group."""
        for g, (layer, part) in enumerate(self.groups.keys):
            yield layer, part, {column: float(getattr(self, column)[g]) for column in COLUMNS}

    def known_columns(self) -> tuple[str, ...]:
        """COLUMNS and those of OPTIMIZER_COLUMNS that this optimizer has."""
        own = (column for column in OPTIMIZER_COLUMNS if np.isfinite(getattr(self, column)).any())
        return (*COLUMNS, *own)

    def as_columns(self) -> dict[str, list]:
        """The table by columns, as metrics.jsonl keeps it: `layer`, `part` and the known columns."""
        layers, parts = zip(*self.groups.keys, strict=True)
        known = {column: getattr(self, column).tolist() for column in self.known_columns()}
        return {"layer": list(layers), "part": list(parts), **known}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _below_one(factor: np.ndarray) -> np.ndarray:
    """1 where a clip factor is below 1, NaN where there is none."""
    return np.where(np.isnan(factor), np.nan, factor < 1.0)


def _log(value: np.ndarray) -> np.ndarray:
    good = np.isfinite(value) & (value > 0)
    return np.where(good, np.log(np.where(good, value, 1.0)), np.nan)
