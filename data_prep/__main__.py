"""Command line: `python -m data_prep plan|run|verify --config configs/data/X.yaml [--section.key=value
...]`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from . import config as configuration
from .audit import verify
from .config_file import field_help, split_arguments
from .errors import DataPrepError
from .executor import make_executor
from .places import is_remote
from .plan import make_plan
from .plan_report import report
from .progress import RunProgress
from .publish import refuse_unreachable
from .quarantine import LISTED_OF_FILE
from .run import run
from .shards import Manifest

_DESCRIPTION = """\
Turn raw text into globally shuffled, tokenised webdataset shards.

  plan     probe input and disk; show tasks, passes, memory, disk and time; leaves nothing behind
  run      prepare the data; started again after a kill it goes on, and gives the same bytes
  verify   read the output again: hashes, tiling, balance of records, exactly-once evidence
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can mend, 3 disk full, 4 damage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    overrides, rest = split_arguments(given, "config", "executor")
    parser = _parser()
    options = parser.parse_args(rest)
    if options.fresh and options.command != "run":
        parser.error(f"argument --fresh: {options.command} removes nothing; it is an option of run")
    try:
        config = configuration.load(options.config, overrides)
        return {"plan": _plan, "run": _run, "verify": _verify}[options.command](config, options)
    except DataPrepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ValueError as error:
        if type(error) is ValueError:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    keys = "configuration keys (in the YAML file, or as --section.key=value):\n"
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description=_DESCRIPTION,
        epilog=keys + field_help(configuration.PrepareConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("plan", "run", "verify"))
    parser.add_argument("--config", required=True, help="YAML file, see configs/data/")
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="processes on this machine, or tasks on a Ray cluster, whose cores and memory `plan` counts then",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="run alone: remove what runs wrote to output_dir and start over"
    )
    return parser


def _plan(config: configuration.PrepareConfig, options: argparse.Namespace) -> int:
    plan = make_plan(config, lambda text: print(text, file=sys.stderr))
    report(plan, Console(soft_wrap=True, markup=False), options.executor)
    return 0


def _run(config: configuration.PrepareConfig, options: argparse.Namespace) -> int:
    manifest = run(config, options.executor, options.fresh)
    _summarise(manifest)
    return 0


def _verify(config: configuration.PrepareConfig, options: argparse.Namespace) -> int:
    refuse_unreachable(config.output_dir)
    executor = make_executor(options.executor, config.resources.workers)
    try:
        progress = RunProgress(None, config.resources.log_seconds)
        output = config.output_dir if is_remote(config.output_dir) else config.output_path
        manifest = verify(output, executor, progress, config)
    finally:
        executor.close()
    print(f"verified: {output} is whole, content {manifest.content_hash}")
    return 0


def _summarise(manifest: Manifest) -> None:
    records = manifest.records
    for name, split in manifest.splits.items():
        inside = f"{split.documents:,} lines, {split.tokens:,} bytes"
        if manifest.vocab_size:
            inside = (
                f"{split.documents:,} documents, {split.tokens:,} tokens, {split.rows:,} rows of "
                f"{manifest.row_tokens}"
            )
        print(f"{name}: {inside}, {len(split.shards)} shard(s)")
    print(
        f"records: {records['read']:,} read = {records['written']:,} written + "
        f"{records['dropped']:,} dropped + {records['quarantined']:,} quarantined"
    )
    for fate in ("dropped", "quarantined"):
        reasons: Counter[str] = Counter()
        for source in manifest.sources:
            reasons.update(source[fate])
        if reasons:
            print(f"{fate}: " + ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common()))
            if fate == "quarantined" and reasons.most_common(1)[0][1] > LISTED_OF_FILE:
                print(
                    f"quarantine.jsonl lists up to {LISTED_OF_FILE:,} of a file for a reason and counts the rest"
                )
    if manifest.vocab_size:
        places = sum(split.rows for split in manifest.splits.values()) * manifest.row_tokens
        tokens = sum(split.tokens for split in manifest.splits.values())
        print(f"padding: {1 - tokens / places:.2%} of {places:,} places in rows; no document was truncated")
    print(f"content {manifest.content_hash} in {manifest.directory}")


if __name__ == "__main__":
    sys.exit(main())
