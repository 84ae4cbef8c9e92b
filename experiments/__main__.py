"""`python -m experiments [NAME ...]` runs the experiments and writes docs/experiments.md; `make experiments` runs all.

Sections of experiments that were not named stay as they are.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from experiments import (
    fan_average,
    gau_output,
    length_transfer,
    relative_change,
    trainability,
    update_size,
    warm_up,
)
from experiments.common import ROOT

EXPERIMENTS = {
    "update_size": update_size.run,
    "trainability": trainability.run,
    "trainability_1000": trainability.run_deepest,
    "trainability_gau": trainability.run_gau,
    "length_transfer": length_transfer.run,
    "gau_output": gau_output.run,
    "relative_change": relative_change.run,
    "warm_up": warm_up.run,
    "fan_average": fan_average.run,
}
PAGE, KEPT = ROOT / "docs/experiments.md", ROOT / "experiments/results.json"
INTRODUCTION = """# Experiments

Claims that make these models interesting, each run here on two cores by one small script of `experiments/`, beside what
was published or measured before. A claim that does not hold here says so. `make experiments` runs all and writes this
page.

"""


def write_page(kept: dict[str, str]) -> None:
    """docs/experiments.md from the sections there are; those that are missing are named."""
    sections = [kept[name] for name in EXPERIMENTS if name in kept]
    missing = [name for name in EXPERIMENTS if name not in kept]
    if missing:
        sections.append(f"## Not run yet\n\n{', '.join(missing)}: `python -m experiments NAME`.\n")
    PAGE.write_text(INTRODUCTION + "\n".join(sections))


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - EXPERIMENTS.keys())
    if unknown:
        sys.exit(f"error: {', '.join(unknown)}: no such experiment; there are {', '.join(EXPERIMENTS)}")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    for name in names or EXPERIMENTS:
        started = time.process_time()  # the same on a busy machine
        finding = EXPERIMENTS[name]()
        finding.seconds = time.process_time() - started
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}  # others may have run meanwhile
        kept[name] = (
            f"{finding.markdown()}\n`python -m experiments {name}`: {finding.seconds:.0f} s of processor time.\n"
        )
        print(kept[name], flush=True)
        KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        write_page(kept)


if __name__ == "__main__":
    main(sys.argv[1:])
