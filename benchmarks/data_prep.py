"""How fast the data preparation is, beside its peers and its own floor, in one run.

`python benchmarks/data_prep.py [--size=2.0]` prints a table and writes benchmarks/results/data_prep.json. The text is
real and repeated (benchmarks/data_prep_text.py); 2 workers with 0.25 GB each; every time is that of a process from its
start until its output is on disk (fsync). Sides alternate, and ratios are medians over the rounds, so that both meet
the same machine. `cpu_` results are the same ratios in core seconds, which other load on the machine blurs less.

Peers: `--terashuf=PATH` is its binary, built from github.com/alexandres/terashuf; `--peers=PATH` the Python of an
environment with datatrove[io,processing], ray[data] and sentencepiece; what is not given, or not asked for with
`--only`, is not measured. Groups may be measured one at a time: each keeps its own commit, command, time and load.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.data_prep_runs import count_repeats, measured
from benchmarks.data_prep_text import make_file
from benchmarks.results import describe_run, write_results
from data_prep.config import TrainSection
from data_prep.tokenizer import train

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks/results/data_prep.json"
PEERS = str(ROOT / "benchmarks/data_prep_peers.py")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>
WORKER_BYTES = 250_000_000
_MODEL_LINES = 30_000
_BUSY = 0.1  # share of the processors that others take before a group, above which its times are not the machine's
GOALS = {
    "shuffle_vs_terashuf": 2.0,
    "shuffle_zstd_vs_terashuf": 1.3,
    "shuffle_short_lines_vs_terashuf": 1.5,
    "shuffle_vs_shuf": None,
    "shuffle_vs_ray_data": 8.0,
    "pipeline_vs_encode_english": 1.3,
    "pipeline_vs_encode_chinese": 1.6,
    "pipeline_vs_datatrove": 2.0,
    "bytes_moved": 2.2,
    "growth": 1.2,
    "resume_repeats": 1.0,
}
LOWER = {
    "pipeline_vs_encode_english",
    "pipeline_vs_encode_chinese",
    "bytes_moved",
    "growth",
    "resume_repeats",
}
GROUPS = ("terashuf", "short", "ray", "encode", "datatrove", "growth", "resume")


def better_of(name: str) -> str:
    return "lower" if name.removeprefix("cpu_") in LOWER else "higher"


class Bench:
    """Files, configurations and measured runs below one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}
        self.groups: dict[str, dict[str, Any]] = {}  # how, when and on what machine each was measured
        self.group = ""
        if (
            len(options.only) < len(GROUPS) and options.output.exists()
        ):  # groups may be measured one at a time
            earlier = json.loads(options.output.read_text())
            self.results = [one for one in earlier["results"] if one["value"] is not None]
            self.notes = earlier["notes"]
            self.groups = earlier.get("groups", {})

    def measure(self, group: str, step: Callable[[], None]) -> None:
        """Run a group; what it gives replaces what an earlier run of the group gave."""
        self.group = group
        self.results = [one for one in self.results if one.get("group") != group]
        # Not the load average: a minute behind, it would be that of the group before.
        before, started = psutil.cpu_percent(3) / 100, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        step()
        self.groups[group] = provenance(self.options) | {"started": started, "busy_before": before}
        busy = f", the machine was {before:.0%} busy before" if before > _BUSY else ""
        for one in self.results:
            if one.get("group") == group:
                commit = self.groups[group]["commit"]
                spread = " .. ".join(f"{value:g}" for value in one.get("range", ()))
                one["note"] = f"{one['rounds']} rounds{spread and f', {spread},'} of {commit[:8]}{busy}"
        write(self)

    def text(self, language: str, line_bytes: int, size_gb: float) -> Path:
        path = self.folder / f"{language}-{line_bytes}-{size_gb:g}.txt"
        source = getattr(self.options, language)
        make_file(
            path, language, line_bytes, int(size_gb * 1e9), Path(source) if source else None, self.folder
        )
        return path

    def model(self, language: str) -> Path:
        path = self.folder / f"{language}.model"
        if not path.exists():
            with self.text(language, 700, self.options.size).open(encoding="utf-8") as file:
                step = max(1, int(self.options.size * 1e9 / 700) // _MODEL_LINES)  # from all of the text
                lines = (line.rstrip("\n") for line in islice(file, 0, step * _MODEL_LINES, step))
                path.write_bytes(
                    train(lines, TrainSection(vocab_size=32_000, threads=2, seed_pieces=300_000))[0]
                )
        return path

    def config(self, name: str, text: Path, **sections: Any) -> tuple[list[str], Path]:
        """(command, output folder) of our run over a text."""
        output = self.folder / f"out-{name}"
        tree: dict[str, Any] = {
            "output_dir": str(output),
            "corpora": [
                {"name": "text", "paths": [str(text)], "format": "jsonl" if text.is_dir() else "txt"}
            ],
            "words": {"segmenter": "none"},
            "resources": {"workers": 2, "worker_memory_bytes": WORKER_BYTES, "log_seconds": 600},
        }
        for key, value in sections.items():
            tree[key] = tree.get(key, {}) | value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return [sys.executable, "-m", "data_prep", "run", "--config", str(path)], output

    def shuffle(self, name: str, text: Path, spill: str) -> Callable[[], tuple[float, float]]:
        """Our shuffle of text, lines in and lines out."""
        as_it_is = {
            "unicode": "none",
            "strip_control": False,
            "collapse_whitespace": False,
            "max_record_bytes": 2**20,
        }
        shards = {"content": "text", "compress_text": False, "validation_share": 0}
        command, output = self.config(
            name, text, cleaning=as_it_is, shards=shards, resources={"spill": spill}
        )
        return lambda: measured(command, fresh=output)

    def pipeline(
        self, name: str, text: Path, model: Path, **sections: Any
    ) -> Callable[[], tuple[float, float]]:
        """Our whole pipeline: read, clean, exact deduplication where there is one, encode, shuffle, write."""
        sections.setdefault("cleaning", {"max_record_bytes": 2**20})
        command, output = self.config(name, text, tokenizer={"load": str(model)}, **sections)
        return lambda: measured(command, fresh=output)

    def compare(self, sides: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, Any]:
        """Medians of alternating runs, by side: (seconds, core seconds), and all pairs."""
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in sides if number % 2 == 0 else reversed(sides):
                times[name].append(sides[name]())
                print(
                    f"  {name:<24}{times[name][-1][0]:>9.1f} s{times[name][-1][1]:>9.1f} core s", flush=True
                )
        return times

    def ratio(self, name: str, over: list[tuple[float, float]], under: list[tuple[float, float]]) -> None:
        """Record `name`: the median over the rounds of seconds / seconds, and the same in core seconds."""
        for prefix, which in (("", 0), ("cpu_", 1)):
            ratios = [a[which] / b[which] for a, b in zip(over, under, strict=True) if b[which] > 0]
            if ratios:
                goal = None if prefix else GOALS[name]
                self.record(prefix + name, statistics.median(ratios), goal, rounds=len(ratios))
                self.results[-1]["range"] = [round(min(ratios), 3), round(max(ratios), 3)]

    def record(
        self, name: str, value: float, goal: float | None, unit: str = "ratio", rounds: int = 1
    ) -> None:
        entry = {
            "name": name,
            "value": round(value, 3),
            "unit": unit,
            "goal": goal,
            "better": better_of(name),
        }
        entry |= {"group": self.group, "rounds": rounds}
        self.results = [one for one in self.results if one["name"] != name] + [entry]


def terashuf(bench: Bench, text: Path) -> Callable[[], tuple[float, float]]:
    environment = os.environ | {
        "MEMORY": str(2 * WORKER_BYTES / 1e9),
        "TMPDIR": str(bench.folder),
        "SEED": "1",
    }
    return lambda: measured(
        [bench.options.terashuf], standard=(text, bench.folder / "out.txt"), env=environment
    )


def against_terashuf(bench: Bench, text: Path, names: tuple[str, ...], tag: str) -> None:
    sides = {spill: bench.shuffle(f"{tag}-{spill}", text, spill) for spill in ("none", "zstd")}
    sides["terashuf"] = terashuf(bench, text)
    if tag == "long":
        target = bench.folder / "out.txt"
        sides["shuf"] = lambda: measured(["shuf", str(text)], standard=(text, target))
    times = bench.compare(sides, bench.options.rounds)
    for name, side in zip(names, ("none", "zstd"), strict=False):
        bench.ratio(name, times["terashuf"], times[side])
    if tag == "long":
        bench.ratio("shuffle_vs_shuf", times["shuf"], times["none"])


def against_ray(bench: Bench, text: Path) -> None:
    output = bench.folder / "out-ray"
    command = [bench.options.peers, PEERS, "ray", str(text), str(output), str(2 * WORKER_BYTES)]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    sides = {
        "none": bench.shuffle("ray-none", text, "none"),
        "ray data": lambda: measured(command, env=environment),
    }
    times = bench.compare(sides, bench.options.rounds)
    bench.ratio("shuffle_vs_ray_data", times["ray data"], times["none"])


def against_encode(bench: Bench, language: str) -> None:
    text, model = bench.text(language, 700, bench.options.pipeline_size), bench.model(language)
    command = [sys.executable, PEERS, "encode", str(model), str(text)]

    def encode() -> tuple[float, float]:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, core_seconds = map(float, result.stdout.split())
        return seconds, core_seconds

    name = f"pipe-{language}"
    sides = {"pipeline": bench.pipeline(name, text, model, **bench.options.dedup), "encode": encode}
    times = bench.compare(sides, bench.options.rounds)
    bench.ratio(f"pipeline_vs_encode_{language}", times["pipeline"], times["encode"])
    run = json.loads((bench.folder / f"out-{name}" / "run.json").read_text())
    bench.notes[f"core_seconds_per_gb_{language}"] = {
        stage: round(found["core_seconds_per_gb"], 2) for stage, found in run["stages"].items()
    } | {
        "encode": round(statistics.median(time[1] for time in times["encode"]) / text.stat().st_size * 1e9, 2)
    }
    bench.notes[f"peak_bytes_{language}"] = {
        stage: found["peak_bytes"] for stage, found in run["stages"].items()
    }
    if language == "english":
        bench.record(
            "bytes_moved", run["bytes"]["per_input_byte"], GOALS["bytes_moved"], "bytes per input byte"
        )
        bench.notes["bytes_moved_proc"] = round(run["proc_bytes"] / text.stat().st_size, 3)


def against_datatrove(bench: Bench) -> None:
    text, model = bench.text("english", 700, bench.options.pipeline_size), bench.model("english")
    source, tokenizer = bench.folder / "jsonl", bench.folder / "tokenizer.json"
    source.mkdir(exist_ok=True)
    with text.open() as lines, (source / "0.jsonl").open("w") as one, (source / "1.jsonl").open("w") as two:
        for number, line in enumerate(lines):
            print(json.dumps({"text": line.rstrip("\n")}, ensure_ascii=False), file=(one, two)[number % 2])
    python = bench.options.peers
    subprocess.run([python, PEERS, "hf-tokenizer", str(model), str(tokenizer)], check=True)
    command = [python, PEERS, "datatrove", str(source), str(bench.folder / "out-datatrove"), str(tokenizer)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    ours = bench.pipeline("jsonl", source, model, cleaning={"max_record_bytes": 2**20})
    sides = {"pipeline": ours, "datatrove": lambda: measured(command, env=environment)}
    times = bench.compare(sides, bench.options.rounds)
    bench.ratio("pipeline_vs_datatrove", times["datatrove"], times["pipeline"])


def growth(bench: Bench) -> None:
    """Seconds per GB at four sizes of `--growth` over those at a quarter, text in and out, memory fixed."""
    small, large = bench.options.growth, bench.options.growth * 16
    texts = [bench.text("english", 700, size) for size in (small, large)]
    sides = {f"{n}": bench.shuffle(f"growth-{n}", text, "none") for n, text in enumerate(texts)}
    times = bench.compare(sides, bench.options.rounds)
    sizes = [text.stat().st_size for text in texts]
    per_byte = [[(a / size, b / size) for a, b in times[f"{n}"]] for n, size in enumerate(sizes)]
    bench.ratio("growth", per_byte[1], per_byte[0])
    bench.notes["growth_gb"] = [small, large]


def resume(bench: Bench) -> None:
    """Tasks that are done again after a kill -9, up to the end of the run that goes on, per worker; the worst of
    three kills.
    """
    text, model = bench.text("english", 700, max(bench.options.growth, 0.4)), bench.model("english")
    cleaning = {"max_record_bytes": 2**20}
    command, output = bench.config("resume", text, tokenizer={"load": str(model)}, cleaning=cleaning)
    kills = [count_repeats(command, output, finished) for finished in (1, 2, 3)]
    bench.notes["resume_kills"] = kills
    worst = max(kill["repeated"] for kill in kills)
    bench.record("resume_repeats", worst / 2, GOALS["resume_repeats"], "tasks per worker", len(kills))


def main() -> None:
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=2.0, help="GB of text for the shuffles")
    parser.add_argument("--pipeline-size", type=float, help="GB for encoding; default: a quarter of size")
    parser.add_argument(
        "--growth", type=float, help="GB of the smaller side of growth; default: a quarter of size"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="build/benchmarks/data_prep")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    for name in ("terashuf", "peers", "english", "chinese"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    options.pipeline_size = options.pipeline_size or options.size / 4
    options.growth = options.growth or options.size / 4
    options.dedup = {"deduplication": {"method": "exact"}}
    bench = Bench(options)
    long_lines = bench.text("english", 700, options.size)
    steps: dict[str, Callable[[], None]] = {
        "terashuf": lambda: against_terashuf(
            bench, long_lines, ("shuffle_vs_terashuf", "shuffle_zstd_vs_terashuf"), "long"
        ),
        "short": lambda: against_terashuf(
            bench, bench.text("english", 75, options.size), ("shuffle_short_lines_vs_terashuf",), "short"
        ),
        "ray": lambda: against_ray(bench, long_lines),
        "encode": lambda: [against_encode(bench, language) for language in ("english", "chinese")] and None,
        "datatrove": lambda: against_datatrove(bench),
        "growth": lambda: growth(bench),
        "resume": lambda: resume(bench),
    }
    for name in options.only:
        needed = {"terashuf": "terashuf", "short": "terashuf", "ray": "peers", "datatrove": "peers"}.get(name)
        if needed and not getattr(options, needed):
            print(f"{name}: not measured, no --{needed}")
            continue
        print(f"{name}:", flush=True)
        bench.measure(name, steps[name])
    print(f"\n{'result':<36}{'value':>10}{'goal':>10}{'rounds':>8}")
    for one in bench.results:
        goal = "" if one["goal"] is None else f"{'≤' if one['better'] == 'lower' else '≥'} {one['goal']}"
        print(f"{one['name']:<36}{one['value']:>10.2f}{goal:>10}{one['rounds']:>8}")


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """Commit, machine and options of a measurement."""
    names = ("size", "pipeline_size", "growth", "rounds")
    command = " ".join(f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names)
    found = describe_run(f"python benchmarks/data_prep.py {command}")
    changed = ["git", "status", "--porcelain", "data_prep", "benchmarks/*.py"]
    if subprocess.run(changed, cwd=ROOT, capture_output=True).stdout:
        found["commit"] += " and changes"
    return found


def write(bench: Bench) -> None:
    """Every group with its own provenance; at the top that of the last. What has a goal and no value is told too."""
    names = {one["name"] for one in bench.results}
    missing = [
        {"name": name, "value": None, "unit": "ratio", "goal": goal, "better": better_of(name)}
        for name, goal in GOALS.items()
        if goal is not None and name not in names
    ]
    content = {"groups": bench.groups, "notes": bench.notes, "results": bench.results + missing}
    last = bench.groups[bench.group]
    top = {"commit": last["commit"], "machine": last["machine"], "command": last["command"]}
    write_results(bench.options.output, top | content)


if __name__ == "__main__":
    main()
