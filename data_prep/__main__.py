"""Command line: `python -m data_prep plan|run|verify --config configs/data/X.yaml [--section.key=value
...]`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import config as configuration
from .audit import verify
from .config_file import field_help, split_arguments
from .errors import DataPrepError
from .executor import make_executor, usable_cores
from .files import free_bytes
from .places import is_remote
from .plan import Plan, make_plan
from .progress import RunProgress
from .run import run
from .shards import Manifest

_DESCRIPTION = """\
Turn raw text into globally shuffled, tokenised webdataset shards.

  plan     show the input, the tasks and what disk and memory they need; writes nothing
  run      prepare the data; started again after a kill it goes on, and gives the same bytes
  verify   read the output again: hashes, tiling, balance of records, exactly-once evidence
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can mend, 3 disk full, 4 damage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    overrides, rest = split_arguments(given, configuration.PrepareConfig)
    options = _parser().parse_args(rest)
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
        help="processes on this machine, or tasks on a Ray cluster",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="run: remove what is in output_dir and start over"
    )
    return parser


def _plan(config: configuration.PrepareConfig, options: argparse.Namespace) -> int:
    plan = make_plan(config)
    console = Console()
    console.print(_input_table(plan))
    workers = config.resources.workers or usable_cores()
    whole = [file.relative for file in plan.files if file.compression]
    train = config.tokenizer.train
    sample_bytes = min(train.sample_bytes, plan.text_bytes)
    facts = Table("what", "estimate", show_header=False, box=None)
    for what, value in (
        ("tasks of pass 1", f"{len(plan.tasks)} for {workers} worker(s)"),
        ("files that one task reads whole", f"{len(whole)} compressed" if whole else "none"),
        ("memory", f"{_size(plan.worker_bytes())} a worker, {_size(plan.worker_bytes() * workers)} in all"),
        (
            "intermediate disk",
            f"{_size(plan.spill_bytes)} in {config.work_base}, {_free(config.work_base)} free",
        ),
        (
            "output disk",
            f"{_size(plan.output_bytes)} in {config.output_path}, {_free(config.output_path)} free",
        ),
        (
            "tokenizer",
            f"load {config.tokenizer.load}"
            if config.tokenizer.load
            else f"train {train.model}, {train.vocab_size:,} pieces, on {_size(sample_bytes)}"
            f" (about {_size(30 * sample_bytes)} of memory)",
        ),
        (
            "rows",
            f"{config.shards.row_tokens} tokens, [CLS] document [SEP] one behind the other; shards of "
            f"{_size(config.shards.target_bytes)} before compression, "
            f"{config.shards.validation_share:.2%} for validation",
        ),
    ):
        facts.add_row(what, value)
    console.print(facts)
    for path in plan.ignored[:5]:
        console.print(f"ignored: {path} (not a text file of the format)", highlight=False)
    if len(plan.ignored) > 5:
        console.print(f"ignored: {len(plan.ignored) - 5} more files")
    return 0


def _input_table(plan: Plan) -> Table:
    table = Table("corpus", "files", "size on disk", "64 MiB blocks", "compressed", title="input")
    for number, corpus in enumerate(plan.config.corpora):
        files = [file for file in plan.files if file.corpus == number]
        blocks = sum(file.blocks or 0 for file in files)
        compressed = sum(1 for file in files if file.compression)
        size = sum(file.size_bytes for file in files)
        table.add_row(corpus.name, f"{len(files):,}", _size(size), f"{blocks:,}", f"{compressed:,}")
    return table


def _run(config: configuration.PrepareConfig, options: argparse.Namespace) -> int:
    manifest = run(config, options.executor, options.fresh)
    _summarise(manifest)
    return 0


def _verify(config: configuration.PrepareConfig, options: argparse.Namespace) -> int:
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
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.rows:,} rows of "
            f"{manifest.row_tokens}, {len(split.shards)} shard(s)"
        )
    print(
        f"records: {records['read']:,} read = {records['written']:,} written + "
        f"{records['dropped']:,} dropped + {records['quarantined']:,} quarantined"
    )
    print(f"content {manifest.content_hash} in {manifest.directory}")


def _free(path: Path) -> str:
    return _size(free_bytes(path))


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main())
