"""The whole road on one machine: raw text → Ray job → shards → DeepSpeed → report → Hugging Face folder (`make demo`).

Every stage is a command that a user could have typed; they are printed as they run. Stages that are done are not done
again, a stage that was interrupted goes on where it stopped, and Ctrl-C leaves no process behind.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DATA_CONFIG = "configs/data/demo.yaml"
RUN_CONFIG = "configs/pretrain/demo.yaml"
RUN_NAME = "roformer_v2_tiny"
BINARIES = Path(sys.executable).parent
MARK = "SUTRAIN_DEMO_STAGE"
STOP_SECONDS = 40.0  # longer than a checkpoint takes: a stopped training saves one first
RAY_CHATTER = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+(INFO|SUCC|WARNING) ")

MASKED_SENTENCES = [
    "中华人民共和国公民在法律面前一律[MASK][MASK]。",
    "当事人对[MASK][MASK]不服的，可以依法申请行政复议或者提起诉讼。",
    "违反本法规定，构成[MASK][MASK]的，依法追究刑事责任。",
    "本法自2021年1月1日起[MASK][MASK]。",
]

console = Console(highlight=False, soft_wrap=True)


class DemoError(RuntimeError):
    """A stage failed; its own output says why."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cluster.demo", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs/demo", help="where everything goes (runs/demo)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="training processes (2)")
    parser.add_argument(
        "overrides", nargs="*", metavar="--section.key=value", help="for the training configuration"
    )
    options, overrides = parser.parse_known_args()
    for stopping in (signal.SIGINT, signal.SIGTERM):  # also where SIGINT was ignored when we were started
        signal.signal(stopping, signal.default_int_handler)
    os.chdir(ROOT)
    try:
        run(options.output.resolve(), options.ranks, overrides + options.overrides)
    except KeyboardInterrupt:
        sys.exit("\nstopped; `make demo` goes on from here")
    except DemoError as error:
        sys.exit(f"error: {error}")


def run(output: Path, ranks: int, overrides: list[str]) -> None:
    """All stages, then the summary."""
    started = time.monotonic()
    raw, data, training, model = (output / name for name in ("raw", "data", RUN_NAME, "model"))
    stage("1 of 6", "fetch a real corpus: 26,196 articles of Chinese law")
    python("-m", "data_prep.fetch", "china-law", "--output", raw)
    stage("2 of 6", "prepare: clean, train a tokenizer, tokenise, shuffle globally, write shards (a Ray job)")
    prepare(raw, data, output)
    stage("3 of 6", f"pretrain a small RoFormerV2 with DeepSpeed ZeRO-1 and AdaFactor on {ranks} processes")
    extra = [f"--run_dir={training}", f"--data.dir={data}", *overrides]
    deepspeed = [BINARIES / "deepspeed", "--quiet", "--num_gpus", ranks, "--master_port", free_port()]
    command(*deepspeed, "sutrain/pretrain.py", "--config", RUN_CONFIG, *extra)
    stage("4 of 6", "write the report")
    python("-m", "sutrain.report", training)
    stage("5 of 6", "export to Hugging Face format")
    if is_current(model, training):
        console.print(f"{model}: exported already")
    else:
        python("-m", "sutrain.export", "--run", training, "--output", model)
    stage("6 of 6", "load it with AutoModelForMaskedLM.from_pretrained and fill masked sentences")
    python("-m", "cluster.fill_masks", model, *MASKED_SENTENCES)
    summary(data, training, model, time.monotonic() - started)


def prepare(raw: Path, data: Path, output: Path) -> None:
    """Submit the preparation to a Ray cluster of this machine; nothing to do where the data set is finished."""
    corpus = json.dumps([f"{glob.escape(str(raw))}/*.jsonl"])
    settings = [f"--corpora.0.paths={corpus}", f"--output_dir={data}"]
    if (data / "manifest.json").is_file():
        python("-m", "data_prep", "run", "--config", DATA_CONFIG, "--executor=local", *settings)
        return
    job = ["-m", "data_prep", "run", "--config", DATA_CONFIG, "--executor=ray", *settings]
    with ray_cluster(output / "ray.log") as address:
        submit = [BINARIES / "ray", "job", "submit", "--address", address, "--working-dir", "."]
        command(*submit, "--log-style=record", "--", sys.executable, *job, hide=RAY_CHATTER)


@contextlib.contextmanager
def ray_cluster(log: Path) -> Iterator[str]:
    """A Ray of our own on free ports, ended with everything it started; yields the address jobs are submitted to.

    Only the processes of this one are ended: `ray stop` would end every Ray of the machine.
    """
    dashboard, agent = free_port(), free_port()
    arguments = ["start", "--head", "--block", "--num-cpus", os.cpu_count() or 1, "--port", free_port()]
    arguments += [
        "--object-store-memory",
        200_000_000,
        "--dashboard-host",
        "127.0.0.1",
        "--dashboard-port",
        dashboard,
    ]
    # The agent runs the jobs; at its usual port it would be in the way of another Ray of this machine.
    arguments += ["--dashboard-agent-listen-port", agent, "--dashboard-agent-grpc-port", free_port()]
    arguments += ["--node-ip-address", "127.0.0.1", "--disable-usage-stats", "--temp-dir"]
    console.print(f"starting Ray on this machine (log: {log})", style="dim")
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        # Ray puts sockets into this folder, and their paths must stay short.
        tempfile.TemporaryDirectory(prefix="sutrain-ray-", ignore_cleanup_errors=True) as folder,
        log.open("w") as output,
        # Killed in the end: its tasks leave whole files or none, and a Ray asked to stop takes half a minute.
        child(
            [BINARIES / "ray", *arguments, folder], signal.SIGKILL, stdout=output, stderr=output
        ) as process,
    ):
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 90
        while not (is_listening(dashboard) and is_listening(agent)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"Ray did not start; see {log}")
            time.sleep(0.3)
        try:
            yield address
        finally:
            console.print("stopping Ray", style="dim")


def is_current(model: Path, training: Path) -> bool:
    """Was the folder exported after the last checkpoint was written?"""
    best = training / "checkpoints" / "best.json"
    done = model / "config.json"
    return done.is_file() and best.is_file() and done.stat().st_mtime >= best.stat().st_mtime


def summary(data: Path, training: Path, model: Path, seconds: float) -> None:
    """The table at the end: what was prepared, how well and how fast it trained, where things are, what to try."""
    manifest = json.loads((data / "manifest.json").read_text())
    records = [json.loads(line) for line in (training / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = {record["step"]: record for record in records if record["kind"] == "evaluation"}
    last = evaluations[max(evaluations)]
    trained = [step for step in evaluations if step > 0]
    tenth = evaluations[min(trained, key=lambda step: abs(step - last["step"] / 10))]
    best = evaluations[json.loads((training / "checkpoints/best.json").read_text())["step"]]
    accuracy, unigram = last["validation_accuracy"], last["unigram_accuracy"]
    train, held_out = manifest["splits"]["train"], manifest["splits"]["validation"]
    rates = sorted(record["tokens_per_second"] for record in steps)

    table = Table(title="From raw text to a pretrained model", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row("prepared", f"{train['documents']:,} articles, {train['tokens']:,} tokens to train on")
    table.add_row(
        "held out",
        f"{held_out['documents']:,} articles, {held_out['tokens']:,} tokens, none of them in training",
    )
    table.add_row("trained", f"{last['step']:,} steps at {rates[len(rates) // 2]:,.0f} tokens/s (median)")
    table.add_row("MLM accuracy", f"{accuracy:.3f} of the held-out tokens behind [MASK], whole words masked")
    table.add_row(
        "  unigram baseline",
        f"{unigram:.3f}: the most frequent token at the same places ({accuracy / max(unigram, 1e-9):.1f} x)",
    )
    table.add_row(
        f"  at step {tenth['step']:,}",
        f"{tenth['validation_accuracy']:.3f} ({accuracy / max(tenth['validation_accuracy'], 1e-9):.1f} x)",
    )
    table.add_row("best checkpoint", f"step {best['step']:,}, accuracy {best['validation_accuracy']:.3f}")
    table.add_row("report", shown(training / "report.html"))
    table.add_row("metrics", shown(training / "metrics.jsonl"))
    table.add_row("model", shown(model))
    table.add_row("time", f"{seconds / 60:.1f} minutes")
    console.print()
    console.print(table)
    console.print("\nTry next (after `. .venv/bin/activate`):")
    console.print(f"  python -m sutrain.plan --config {RUN_CONFIG}")
    console.print(f"  python -m data_prep verify --config {DATA_CONFIG}")
    console.print(
        f"  deepspeed --num_gpus 2 sutrain/pretrain.py --config {RUN_CONFIG} --steps=800 --run_dir=runs/longer"
    )


# ------------------------------------------------------------------------------------------------------- processes


def stage(number: str, title: str) -> None:
    console.print(f"\n[bold]{number}[/]  {title}")


def python(*arguments: object) -> None:
    command(sys.executable, *arguments)


def command(*arguments: object, hide: re.Pattern[str] | None = None) -> None:
    """Run one command with its output on this terminal, lines that begin like `hide` left out. Raises DemoError."""
    words = [str(argument) for argument in arguments]
    shortened = [Path(words[0]).name, *(word.replace(f"{ROOT}/", "") for word in words[1:])]
    console.print(f"$ {shlex.join(shortened)}", style="dim", markup=False, soft_wrap=True)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if hide else {}
    with child(words, **streams) as process:
        for line in process.stdout or ():
            text = line.decode(errors="replace")
            if hide is None or not hide.match(text):
                sys.stdout.write(text)
                sys.stdout.flush()
        status = process.wait()
    if status:
        raise DemoError(f"{shortened[0]} ended with status {status}")


@contextlib.contextmanager
def child(
    words: list[Any], stop_with: int = signal.SIGTERM, **streams: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended, with everything it started, when we leave.

    What it starts is known by a mark in the environment, which children inherit: DeepSpeed's launcher hands no SIGTERM
    down, and a Ray job runs in a session of its own.
    """
    mark = uuid.uuid4().hex
    environment = (
        os.environ
        | {
            "PATH": os.pathsep.join([str(BINARIES), os.environ.get("PATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "disabled",  # a token left in the home folder by another Ray would make submitting fail
            "RAY_USAGE_STATS_ENABLED": "0",
            MARK: mark,
        }
    )
    process = subprocess.Popen(
        [str(word) for word in words], env=environment, start_new_session=True, **streams
    )
    try:
        yield process
    finally:
        for sent in (stop_with, signal.SIGKILL):
            deadline = time.monotonic() + STOP_SECONDS
            with contextlib.suppress(KeyboardInterrupt):
                signal_all(mark, sent)
                while alive(mark) and time.monotonic() < deadline:
                    process.poll()
                    time.sleep(0.1)
        process.wait()


def alive(mark: str) -> list[psutil.Process]:
    """Running processes that carry the mark. (What nobody has buried yet does not run.)"""
    found = []
    for process in psutil.process_iter(["status", "environ"]):
        marked = (process.info["environ"] or {}).get(MARK) == mark
        if marked and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def signal_all(mark: str, sent: int) -> None:
    for process in alive(mark):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(sent)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    main()
