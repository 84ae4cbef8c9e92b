"""A small real data set, prepared by the real pipeline, that the tests of training share."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROW_TOKENS = 32
VOCAB_SIZE = 320


def environment(**changes: str) -> dict[str, str]:
    """The environment of a user's shell after activating the virtual environment, with one thread per process."""
    binaries = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": os.pathsep.join([binaries, os.environ.get("PATH", "")]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        **changes,
    }


def chinese_texts(count: int, seed: int = 0) -> list[str]:
    """Sentences with structure to learn: words of two characters, each word followed by one of three others."""
    draw = random.Random(seed)
    characters = [chr(0x4E00 + 7 * i) for i in range(120)]
    words = ["".join(draw.sample(characters, 2)) for _ in range(90)]
    after = {word: draw.sample(words, 3) for word in words}
    texts = []
    for _ in range(count):
        word, text = draw.choice(words), []
        for _ in range(draw.randint(4, 40)):
            text.append(word)
            word = draw.choice(after[word])
        texts.append("".join(text) + "。")
    return texts


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A folder that `data_prep run` made from 3,000 sentences."""
    folder = tmp_path_factory.mktemp("dataset")
    source = folder / "raw.jsonl"
    source.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in chinese_texts(3000)), encoding="utf-8"
    )
    config = {
        "seed": 3,
        "output_dir": str(folder / "data"),
        "corpora": [{"name": "made", "paths": [str(source)]}],
        "tokenizer": {"train": {"vocab_size": VOCAB_SIZE, "sample_bytes": 1_000_000}},
        "shards": {
            "row_tokens": ROW_TOKENS,
            "validation_share": 0.1,
            "block_bytes": 4096,
            "target_bytes": 65536,
        },
        "resources": {"workers": 1},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(config))
    command = [
        sys.executable,
        "-m",
        "data_prep",
        "run",
        "--config",
        str(folder / "data.yaml"),
        "--executor=local",
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "data"


RUN = {
    "run_dir": "to be set",
    "steps": 12,
    "data": {"dir": "to be set"},
    "model": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "head_size": 16,
        "feed_forward_size": 64,
        "max_row_tokens": ROW_TOKENS,
    },
    "batch": {"global_sequences": 12, "micro_sequences": 2},
    "optimizer": {"name": "adafactor", "learning_rate": 0.05},
    "evaluation": {"every_steps": 6, "sequences": 40},
    "checkpoint": {"every_steps": 6},
    "monitor": {"port": 0, "probe_every_steps": 4},
}


@pytest.fixture
def write_config(tmp_path):
    """write_config(name, **sections) -> path of a YAML file of a tiny run with those sections changed."""

    def write(name: str = "run", **sections) -> Path:
        tree = {**RUN, "run_dir": str(tmp_path / name)}
        for key, value in sections.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A copy of the repository's files, to run commands in that write beside the sources."""
    folder = tmp_path_factory.mktemp("workspace")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


FEW_STEPS = [
    "--steps=8",
    "--evaluation.every_steps=4",
    "--evaluation.sequences=64",
    "--schedule.warmup_steps=2",
]


def run_demo(workspace: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """`python -m cluster.demo` in a copy of the repository."""
    command = [sys.executable, "-m", "cluster.demo", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=workspace, env=environment(**variables), **streams)


@pytest.fixture(scope="session")
def short_demo(workspace) -> tuple[Path, str]:
    """(workspace, output) of a demo of 8 steps."""
    process = run_demo(workspace, *FEW_STEPS, "--monitor.port=0")
    try:
        output = process.communicate(timeout=400)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it ends what it started
        pytest.fail(f"the demo took over 400 s; its output:\n{process.communicate()[0]}")
    assert process.returncode == 0, output
    return workspace, output


@pytest.fixture
def evidence(request):
    """evidence(**numbers): keep what a long test measured as build/evidence/NAME.json."""

    def keep(**numbers) -> None:
        folder = ROOT / "build/evidence"
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "test": request.node.nodeid,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **numbers,
        }
        (folder / f"{request.node.name}.json").write_text(json.dumps(content, indent=1) + "\n")

    return keep


# Files that one worker is at for long: taken up first, so that no worker ends long after the other.
LONGEST_FILES = (
    "test_demo.py", "test_zero.py", "test_pretrain.py", "test_zero_stages.py", "test_run.py", "test_supervise.py",
    "test_export.py", "test_pretrain_failures.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


# A test may only be skipped for a reason of the list: a skip nobody looks at is a test nobody has.
ALLOWED_SKIPS = set((ROOT / "tests/allowed_skips.txt").read_text().splitlines())
_unexpected_skips: list[str] = []


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = (
            report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple | list) else "?"
        )
        if reason not in ALLOWED_SKIPS:
            _unexpected_skips.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session, exitstatus):
    if _unexpected_skips and exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    for line in _unexpected_skips:
        terminalreporter.write_line(
            f"ERROR skipped for a reason that is not in tests/allowed_skips.txt: {line}", red=True
        )
