"""`python -m experiments [NAME ...]` runs the experiments and writes docs/experiments.md; `make experiments` runs all.

Sections of experiments that were not named stay as they are.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from experiments import fan_average, gau_output, relative_change, trainability, update_size
from experiments.common import ROOT

EXPERIMENTS = {
    "update_size": update_size.run,
    "trainability": trainability.run,
    "trainability_gau": trainability.run_gau,
    "gau_output": gau_output.run,
    "relative_change": relative_change.run,
    "fan_average": fan_average.run,
}
PAGE, KEPT = ROOT / "docs/experiments.md", ROOT / "experiments/results.json"
INTRODUCTION = """# Experiments

Claims that make these models interesting, each run here on two cores by one small script of `experiments/`, beside what
was published or measured before. A claim that does not hold here says so. `make experiments` runs all and writes this
page.

"""


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - EXPERIMENTS.keys())
    if unknown:
        sys.exit(f"error: {', '.join(unknown)}: no such experiment; there are {', '.join(EXPERIMENTS)}")
    torch.set_num_threads(2)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in names or EXPERIMENTS:
        started = time.perf_counter()
        finding = EXPERIMENTS[name]()
        finding.seconds = time.perf_counter() - started
        kept[name] = f"{finding.markdown()}\n`python -m experiments {name}`: {finding.seconds:.0f} s.\n"
        print(kept[name], flush=True)
        KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        sections = [kept[known] for known in EXPERIMENTS if known in kept]
        PAGE.write_text(INTRODUCTION + "\n".join(sections))


if __name__ == "__main__":
    main(sys.argv[1:])
