"""A small corpus, the output of the pipeline over it, and a small disk, shared by the tests."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest

from tests.data_prep.made import make_texts, prepare, settings, write_jsonl


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with two jsonl files and one gz, 3,000 texts in all."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(3000)
    write_jsonl(folder / "a.jsonl", texts[:1200])
    write_jsonl(folder / "sub" / "b.jsonl", texts[1200:2200])
    plain = write_jsonl(folder / "c.jsonl", texts[2200:])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    plain.unlink()
    return folder


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory) -> Path:
    """The output of the pipeline over `corpus`; tests that change it copy it first."""
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(settings(output, [corpus], resources={"task_bytes": 1}))
    return output


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own: (folder, function that gives it another size)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("a file system cannot be mounted here (it takes root)")
    yield (
        folder,
        lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True),
    )
    subprocess.run(["umount", "-l", str(folder)], check=True)
