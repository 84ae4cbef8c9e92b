"""What may change when a run goes on from its checkpoint, and what may not; and how a new run begins from old weights.

A checkpoint carries the configuration and a summary of the data it was made with. `check` compares them with those of
now: what is free is listed, so that it can be logged; what is fixed is refused with the difference shown, and some of
it can be accepted by name (`accept_changes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_prep.config_file import ConfigError, Section
from data_prep.shards import Manifest
from sutrain import checkpoint as checkpoints
from sutrain.config import Masking
from sutrain.models.configuration import EncoderConfig
from sutrain.optim import FragmentMap

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


def begin_from(source: Path, fragments: FragmentMap) -> None:
    """Give a new run the weights of an older one. Collective; raises ConfigError as initial_weights does."""
    for name, values in initial_weights(source, fragments.shapes).items():
        fragments.load_master(name, 0, values)
    fragments.refresh_model_weights()


def initial_weights(source: Path, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """fp32 weights by name to begin a new run with.

    source: a checkpoint folder, a run folder (its best checkpoint, else the newest intact one), or an exported folder.
    Raises ConfigError when it is none of these or its tensors are not those of the model (every difference named).
    """
    weights = _weights_in(source)
    problems = [f"{name}: missing there" for name in shapes.keys() - weights.keys()]
    problems += [f"{name}: not part of this model" for name in weights.keys() - shapes.keys()]
    problems += [
        f"{name}: {list(weights[name].shape)} there, {list(shape)} in this model"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        raise ConfigError("\n".join(f"init_from {source}: {problem}" for problem in sorted(problems)))
    return weights


def _weights_in(source: Path) -> dict[str, torch.Tensor]:
    exported, directory = source / "model.safetensors", source / "checkpoints"
    try:
        if exported.is_file():
            tensors = load_file(exported)
            return {name.removeprefix("model."): values.float() for name, values in tensors.items()}
        if directory.is_dir():
            marked = checkpoints.best(directory)
            if marked is not None:
                return checkpoints.load_full_weights(directory / checkpoints.step_name(marked["step"]))
            newest, damaged = checkpoints.find_latest(directory)
            if newest is None:
                raise ConfigError(
                    f"init_from {source}: no intact checkpoint there {'; '.join(damaged)}".rstrip()
                )
            return newest.full_weights()
        if (source / "manifest.json").is_file():
            return checkpoints.load_full_weights(source)
    except (checkpoints.CheckpointError, SafetensorError) as error:
        raise ConfigError(f"init_from {source}: {error}") from None
    raise ConfigError(f"init_from {source}: neither a checkpoint, nor a run folder, nor an exported model")
