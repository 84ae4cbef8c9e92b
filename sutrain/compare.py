"""Do two runs agree? python -m sutrain.compare RUN_A RUN_B [--exact] [--tolerance 1e-3] [--write-golden FILE]

Compares step by step what was read (the fingerprint of documents and masks of every global batch, samples consumed) and
what came out of it (loss, gradient norm), and with --exact also every tensor of the newest checkpoint both have. A RUN
is a run folder or a golden file: one line a step, `step fingerprint samples_consumed loss grad_norm`.
The exit status is 0 when they agree, 1 when they do not, 2 when they cannot be compared.

What was read must be the same always. Losses must be the same to the last bit with --exact, else within the tolerance.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from sutrain import checkpoint as checkpoints
from sutrain.monitor.log import DamagedLogError
from sutrain.monitor.log import read_steps as step_records

COLUMNS = ("step", "fingerprint", "samples_consumed", "loss", "grad_norm")


@dataclass(frozen=True, slots=True)
class Step:
    """What is compared of one step."""

    fingerprint: str
    samples_consumed: int
    loss: float
    grad_norm: float


class CompareError(ValueError):
    """Two runs cannot be compared; the message says why."""


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; prints what differs and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sutrain.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run_a", type=Path, help="run folder or golden file")
    parser.add_argument("run_b", type=Path, nargs="?", help="run folder or golden file")
    parser.add_argument("--exact", action="store_true", help="losses and checkpoints to the last bit")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="relative, of losses, without --exact (1e-3)"
    )
    parser.add_argument("--write-golden", type=Path, help="write RUN_A as a golden file instead")
    options = parser.parse_args(arguments)
    try:
        steps_a = read_steps(options.run_a)
        if options.write_golden:
            options.write_golden.write_text(golden_text(steps_a))
            return 0
        if options.run_b is None:
            parser.error("two runs are needed")
        steps_b = read_steps(options.run_b)
        differences = compare_steps(steps_a, steps_b, 0.0 if options.exact else options.tolerance)
        if options.exact:
            differences += compare_checkpoints(options.run_a, options.run_b)
    except (CompareError, DamagedLogError, checkpoints.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in differences:
        print(line)
    common = len(steps_a.keys() & steps_b.keys())
    print(f"{common} steps compared: {'they differ' if differences else 'they agree'}")
    return 1 if differences else 0


def read_steps(source: Path) -> dict[int, Step]:
    """Steps by number of a run folder, or of a golden file. Raises DamagedLogError or CompareError."""
    if source.is_file() and source.suffix == ".txt":
        return _read_golden(source)
    return {
        line["step"]: Step(
            line["batch_fingerprint"], line["samples_consumed_total"], line["loss"], line.get("grad_norm", float("nan"))
        )
        for line in step_records(source)
    }  # fmt: skip


def golden_text(steps: dict[int, Step]) -> str:
    """A golden file: numbers to the last bit, so that it can also be compared exactly on the machine it is from."""
    lines = [f"# {' '.join(COLUMNS)}"]
    lines += [
        f"{number} {step.fingerprint} {step.samples_consumed} {step.loss!r} {step.grad_norm!r}"
        for number, step in sorted(steps.items())
    ]
    return "\n".join(lines) + "\n"


def compare_steps(a: dict[int, Step], b: dict[int, Step], tolerance: float) -> list[str]:
    """What differs over the steps that both have, first of each kind; one that only one of them has in the middle too.

    tolerance: relative, of loss and gradient norm; 0 asks for the same bits. Raises CompareError without common steps.
    """
    common = sorted(a.keys() & b.keys())
    if not common:
        raise CompareError("the runs have no step in common")
    differences = []
    between = range(common[0], common[-1] + 1)
    if missing := [step for step in between if step not in a or step not in b]:
        differences.append(f"step {missing[0]}: only one of the runs has it ({len(missing)} such steps)")
    for name in ("fingerprint", "samples_consumed"):
        wrong = [step for step in common if getattr(a[step], name) != getattr(b[step], name)]
        if wrong:
            one, other = getattr(a[wrong[0]], name), getattr(b[wrong[0]], name)
            said = "documents or masks" if name == "fingerprint" else name
            differences.append(f"step {wrong[0]}: {said} differ: {one} and {other} ({len(wrong)} such steps)")
    for name in ("loss", "grad_norm"):
        off = {step: _relative(getattr(a[step], name), getattr(b[step], name)) for step in common}
        wrong = [step for step in common if not off[step] <= tolerance]
        if wrong:
            one, other = getattr(a[wrong[0]], name), getattr(b[wrong[0]], name)
            differences.append(
                f"step {wrong[0]}: {name} {one!r} and {other!r}; largest relative difference "
                f"{max(off.values()):.2e}, allowed {tolerance:g} ({len(wrong)} such steps)"
            )
    return differences


def compare_checkpoints(run_a: Path, run_b: Path) -> list[str]:
    """Tensors of the newest checkpoint both run folders have that are not the same bits; nothing for golden files.

    Raises CheckpointError when it is damaged, CompareError when the folders have none in common.
    """
    folders = [run / "checkpoints" for run in (run_a, run_b)]
    if not all(run.is_dir() for run in (run_a, run_b)):
        return []
    names = [{folder.name for folder in checkpoints.by_age(folder)} for folder in folders]
    if not names[0] & names[1]:
        raise CompareError(f"{run_a} and {run_b}: no checkpoint of the same step")
    name = max(names[0] & names[1])
    state_a, state_b = (whole_state(folder / name) for folder in folders)
    differences = [f"{name}: {key} is in one of them only" for key in sorted(state_a.keys() ^ state_b.keys())]
    for key in sorted(state_a.keys() & state_b.keys()):
        if not _same_bits(state_a[key], state_b[key]):
            differences.append(f"{name}: {key} differs")
    return differences


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as "KEY of NAME", put together from the pieces of all ranks, and the counters.

    Raises CheckpointError.
    """
    checkpoint = checkpoints.Checkpoint(folder)
    checkpoint.verify()
    state = {f"replicated {name}": values for name, values in checkpoint.replicated().items()}
    for (key, name), elements in checkpoint.contents().items():
        state[f"{key} of {name}"] = checkpoint.read(key, name, 0, elements)
    counters = checkpoint.counters
    for name in ("steps", "samples_consumed", "tokens", "skipped"):
        state[f"counter {name}"] = torch.tensor(counters[name])
    for name, number in counters.get("optimizer", {}).items():  # updates applied, the loss scaler's numbers
        state[f"counter {name}"] = torch.tensor(number)
    return state


def _read_golden(source: Path) -> dict[int, Step]:
    steps = {}
    for number, line in enumerate(source.read_text().splitlines(), 1):
        if line.startswith("#"):
            continue
        try:
            step, fingerprint, samples, loss, norm = line.split()
            steps[int(step)] = Step(fingerprint, int(samples), float(loss), float(norm))
        except ValueError:
            raise CompareError(
                f"{source}, line {number}: expected {' '.join(COLUMNS)}, found {line[:80]!r}"
            ) from None
    return steps


def _relative(one: float, other: float) -> float:
    """0 for the same bits, also where both are no number; infinite where only one of them is."""
    if one == other or (one != one and other != other):
        return 0.0
    difference = abs(one - other) / max(abs(one), abs(other))
    return difference if difference == difference else float("inf")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)))


if __name__ == "__main__":
    sys.exit(main())
