"""`python -m sutrain.report RUN_DIR [RUN_DIR ...]`: a page about a run, or about several over one another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sutrain.monitor import pictures
from sutrain.monitor.report import page, read_runs
from sutrain.monitor.verdicts import headline


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page (and the picture, if asked for); returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sutrain.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a run (it holds metrics.jsonl)")
    parser.add_argument(
        "--output", type=Path, help="the page; default: report.html in the first run's folder"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="PATH.png", help="also one summary picture of the first run"
    )
    options = parser.parse_args(arguments)
    try:
        runs = read_runs(options.runs)
        output = options.output or next(iter(runs.values())).path.parent / "report.html"
        output.write_text(page(runs), encoding="utf-8")
        print(output)
        if options.picture:
            name, run = next(iter(runs.items()))
            pictures.summary(name, run, headline(run)).savefig(options.picture, dpi=130)
            print(options.picture)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
