"""What may change when a run goes on from its checkpoint, and what may not; and how a new run begins from old weights.

A checkpoint carries the configuration and a summary of the data it was made with. `check` compares them with those of
now: what is free is listed, so that it can be logged; what is fixed is refused with the difference shown, and some of
it can be accepted by name (`accept_changes`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from data_prep.config_file import ConfigError, Section
from data_prep.shards import Manifest
from sutrain import checkpoint as checkpoints
from sutrain import heartbeat
from sutrain.config import Masking
from sutrain.models.configuration import EncoderConfig
from sutrain.optim import FragmentMap
from sutrain.optim.base import FragmentOptimizer

# The longest prefix of a key decides. A key that is not listed is fixed: what nobody thought about is not safe to
# change.
MAY_CHANGE = (
    "run_dir", "determinism", "steps", "precision", "gradient_precision", "data", "batch", "optimizer", "schedule",
    "zero", "evaluation", "checkpoint", "monitor", "model.hidden_dropout", "model.attention_dropout", "accept_changes",
    "init_from", "start_timeout_seconds", "acting", "loss_scale", "memory", "compile_layers",
)  # fmt: skip
FIXED = ("model", "optimizer.name", "data.weight", "data.others.weight")
"""Never: the state would not fit, or no longer mean the same. `init_from` begins a new schedule from the weights."""
ACCEPTABLE = ("seed", "masking", "corpora")
"""Fixed, unless accept_changes names them: the run can go on, but is no longer the one that began. `corpora` is the
content of the data, not a key; where it lies may change."""


def identity(config: Section, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """What a checkpoint remembers of the run: the whole configuration, and what the data was."""
    return {
        "config": config.model_dump(mode="json"),
        "corpora": [summary(manifest) for manifest in manifests],
    }


def summary(manifest: Manifest) -> dict[str, Any]:
    """A data set in a few numbers, so that a difference can be shown and not only noticed."""
    return {
        "content_hash": manifest.content_hash,
        "vocab_size": manifest.vocab_size,
        "row_tokens": manifest.row_tokens,
        "has_words": manifest.has_words,
        "seed": manifest.seed,
        "splits": {
            name: {"rows": split.rows, "documents": split.documents, "tokens": split.tokens, "shards":
            len(split.shards)}
            for name, split in manifest.splits.items()
        },
    }  # fmt: skip


def check(saved: Mapping[str, Any], current: Mapping[str, Any], accepted: Sequence[str]) -> list[str]:
    """One line for each difference that is let through. Raises ConfigError with all that is not, and the way out."""
    if "config" not in saved or "corpora" not in saved:
        raise ConfigError("the checkpoint does not say what it was made with; begin a new run with init_from")
    # Settings younger than the checkpoint had their defaults.
    before = flat({"model": vars(EncoderConfig()), "masking": Masking().model_dump(mode="json")})
    before = {key: value for key, value in before.items() if key in flat(current["config"])}
    before |= flat(saved["config"]) | flat({"corpora": saved["corpora"]})
    now = flat(current["config"]) | flat({"corpora": current["corpora"]})
    allowed, refused = [], []
    ways_out = set()
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        line = f"{key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        rule = rule_of(key)
        if key == "init_from" or (key == "loss_scale.initial" and before.get("precision") == "fp16"):
            line += " (without effect: only a run that begins looks at it)"
        if rule == "may change":
            allowed.append(line)
        elif rule in accepted:
            allowed.append(f"{line} (accepted)")
        else:
            refused.append(line)
            ways_out.add(
                f"--accept_changes=[{rule}] to go on all the same" if rule in ACCEPTABLE
                else "--init_from=CHECKPOINT with another run_dir to begin a new schedule from these weights"
            )  # fmt: skip
    if refused:
        lines = "\n".join(refused)
        raise ConfigError(
            f"{lines}\nthe run in this folder cannot go on so; restore these, or choose another run_dir, or "
            + ", or ".join(sorted(ways_out))
        )
    return allowed


def rule_of(key: str) -> str:
    """`may change`, `fixed`, or the word for accept_changes that lets a difference of this key through."""
    rules = dict.fromkeys(MAY_CHANGE, "may change") | dict.fromkeys(FIXED, "fixed")
    rules |= {name: name for name in ACCEPTABLE}
    parts = [part for part in key.split(".") if not part.isdigit()]
    for length in range(len(parts), 0, -1):
        if rule := rules.get(".".join(parts[:length])):
            return rule
    return "fixed"


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts and lists as {dotted key: leaf}."""
    return dict(_leaves(tree, prefix))


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    items: Any = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    )
    if items is None:
        yield prefix, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def load_state(
    checkpoint: checkpoints.Checkpoint, fragments: FragmentMap, optimizer: FragmentOptimizer
) -> list[str]:
    """Give a run the weights and the optimizer state of its checkpoint, each rank what it owns. Returns a line for each
    part of the state that begins anew or is dropped. Raises CheckpointError or StateError."""

    def read(key: str, name: str, offset: int, length: int) -> torch.Tensor:
        heartbeat.beat("resuming", checkpoint.step)  # a thousand layers are 50,000 reads
        return checkpoint.read(key, name, offset, length)

    for piece in fragments.fragments:
        piece.values().copy_(read(checkpoints.MASTER, piece.name, piece.offset, piece.length))
    fragments.refresh_model_weights()
    state = (checkpoint.replicated(), checkpoint.counters["optimizer"], read, checkpoint.contents())
    return optimizer.load_state_by_name(*state)


@dataclass(frozen=True)
class Weights:
    """fp32 weights of some model on disk: their shapes, and any range of one of them."""

    shapes: Mapping[str, Sequence[int]]
    read: Callable[[str, int, int], torch.Tensor]
    """(name, offset, length) -> flat values."""
    step: int = 0
    """Of the checkpoint; 0 for an exported model."""


def begin_from(source: Path, fragments: FragmentMap, device: torch.device) -> None:
    """Give a new run the weights of an older one. Collective: rank 0 chooses and checks what is read, and every rank
    reads the part that it owns. Raises ConfigError as open_weights and check_shapes do, and CheckpointError where one
    host does not see what rank 0 reads."""
    chosen, weights = torch.tensor(_REFUSED, device=device), None
    try:
        if dist.get_rank() == 0:
            weights = open_weights(source)
            check_shapes(source, weights.shapes, fragments.shapes)
            chosen.fill_(weights.step)
    finally:
        dist.broadcast(chosen, 0)
    if weights is None:
        if int(chosen) == _REFUSED:
            raise ConfigError(f"init_from {source}: refused on rank 0, which says why")
        try:
            weights = open_weights(source, step=int(chosen))
        except (ConfigError, OSError) as error:  # of this rank alone, and so told by it
            raise checkpoints.CheckpointError(f"rank 0 reads it, this host does not: {error}") from None
    for piece in fragments.fragments:
        heartbeat.beat("reading weights", 0)
        piece.values().copy_(weights.read(piece.name, piece.offset, piece.length))
    fragments.refresh_model_weights()


_REFUSED = -1


def check_shapes(
    source: Path, found: Mapping[str, Sequence[int]], expected: Mapping[str, torch.Size]
) -> None:
    """Raises ConfigError, with every difference named, unless both have the same tensors."""
    problems = [f"{name}: missing there" for name in expected.keys() - found.keys()]
    problems += [f"{name}: not part of this model" for name in found.keys() - expected.keys()]
    problems += [
        f"{name}: {list(found[name])} there, {list(shape)} in this model"
        for name, shape in expected.items()
        if name in found and list(found[name]) != list(shape)
    ]
    if problems:
        raise ConfigError("\n".join(f"init_from {source}: {problem}" for problem in sorted(problems)))


def open_weights(source: Path, step: int | None = None) -> Weights:
    """Weights to begin a new run with.

    source: a checkpoint folder, a run folder (its best checkpoint, else the newest intact one), or an exported folder.
    step: the checkpoint of a run folder that was chosen and checked before; nothing is checked again then.
    Raises ConfigError when it is none of these, or damaged.
    """
    directory = source / "checkpoints"
    try:
        if (source / "model.safetensors").is_file():
            return _exported(source / "model.safetensors")
        if directory.is_dir():
            folder = _chosen(source, directory) if step is None else directory / checkpoints.step_name(step)
        elif (source / "manifest.json").is_file():
            folder = source
        else:
            raise ConfigError(
                f"init_from {source}: neither a checkpoint, nor a run folder, nor an exported model"
            )
        checkpoint = checkpoints.Checkpoint(folder)
        if step is None:
            checkpoint.verify()
        read = functools.partial(checkpoint.read, checkpoints.MASTER)
        return Weights(checkpoint.shapes, read, checkpoint.step)
    except (checkpoints.CheckpointError, SafetensorError) as error:
        raise ConfigError(f"init_from {source}: {error}") from None


def _chosen(source: Path, directory: Path) -> Path:
    marked = checkpoints.best(directory)
    if marked is not None:
        return directory / checkpoints.step_name(marked["step"])
    newest, damaged = checkpoints.find_latest(directory)
    if newest is None:
        raise ConfigError(f"init_from {source}: no intact checkpoint there {'; '.join(damaged)}".rstrip())
    return newest.folder


def _exported(file: Path) -> Weights:
    opened = safe_open(file, framework="pt")
    stored = {name.removeprefix("model."): name for name in opened.keys()}  # noqa: SIM118
    shapes = {name: opened.get_slice(there).get_shape() for name, there in stored.items()}

    def read(name: str, offset: int, length: int) -> torch.Tensor:
        return opened.get_tensor(stored[name]).flatten()[offset : offset + length].float()

    return Weights(shapes, read)
