"""What a run would fail of in the end is told before it does anything, all at once, by `plan` and `run` alike."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from data_prep import mistakes, plan_report, sample
from data_prep.__main__ import main
from data_prep.config import PrepareConfig
from data_prep.errors import DataPrepError
from data_prep.plan import make_plan
from tests.data_prep.made import make_texts, prepare, settings, write_jsonl


@pytest.fixture
def tree(tmp_path) -> dict:
    """A tokenizer is to be trained."""
    return settings(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", make_texts(300))])


def command(tree: dict, folder: Path, *arguments: str) -> int:
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return main([*arguments, "--config", str(folder / "config.yaml")])


@pytest.mark.parametrize("arguments", [("plan",), ("run",), ("run", "--fresh")])
def test_all_mistakes_are_told_at_once_and_nothing_is_cleared_before(tree, tmp_path, capsys, arguments):
    if "--fresh" in arguments:
        prepare(tree)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    capsys.readouterr()
    tree["corpora"][0]["text_field"] = "body"
    tree["resources"] |= {"memory_bytes": 400_000_000, "workers": 2}
    assert command(tree, tmp_path, *arguments) == 2
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert first.startswith("error: corpora.0 (made): no record gives a text (300 missing_field")
    assert second.startswith("resources.memory_bytes: 400,000,000 bytes for 2 workers, but each takes ")
    assert not said.out
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    assert before == after and bool(before) == ("--fresh" in arguments)


@pytest.mark.parametrize("arguments", [("plan",), ("run",)])
def test_training_that_does_not_fit_is_told_before_a_sample_is_taken(
    tree, tmp_path, monkeypatch, capsys, arguments
):
    tree["resources"] |= {"memory_bytes": 10**13, "workers": 1}
    monkeypatch.setattr(mistakes, "machine_bytes", lambda: 2 * 10**9)
    monkeypatch.setattr(sample, "available_bytes", lambda: 1000)
    monkeypatch.setattr("data_prep.estimate.training_bytes", lambda section, text_bytes: 3 * 10**9)
    assert command(tree, tmp_path, *arguments) == 2
    assert not (tmp_path / "out").exists()
    memory, free = capsys.readouterr().err.splitlines()
    given = "resources.memory_bytes: 10,000,000,000,000 bytes, of which this machine has 2,000,000,000,"
    assert memory == (
        f"error: {given} but training the tokenizer takes about 3,268,435,456: take a smaller "
        "tokenizer.train.sample_bytes, or give more"
    )
    assert free.startswith("tokenizer.train.sample_bytes: training on ") and "1,000 are free" in free
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    (tmp_path / "out" / "tokenizer" / "tokenizer.json").write_text("{}")
    mistakes.refuse_mistakes(make_plan(PrepareConfig.model_validate(tree)), 1)


class Cluster:
    """What `plan` asks a Ray cluster for, with room for tasks of a gigabyte."""

    def __init__(self, workers, fence, memory_bytes, say) -> None:
        self.workers = 70

    def await_room(self, memory_bytes: int) -> None:
        if memory_bytes > 10**9:
            raise DataPrepError("fits no node")


def test_plan_counts_the_cores_and_the_memory_of_the_cluster(tree, monkeypatch):
    monkeypatch.setattr(plan_report, "RayExecutor", Cluster)
    del tree["resources"]["workers"]
    plan = make_plan(PrepareConfig.model_validate(tree))
    for name, told in (
        ("ray", "for 70 worker(s), as the cluster has room"),
        ("local", ", as this machine has cores"),
    ):
        console = Console(file=io.StringIO(), width=1000)
        plan_report.report(plan, console, name)
        assert told in console.file.getvalue()
    tree["tokenizer"]["train"] |= {"sample_bytes": 10**9}
    plan = make_plan(PrepareConfig.model_validate(tree))
    monkeypatch.setattr("data_prep.plan.training_bytes", lambda section, text_bytes: 10**9)
    with pytest.raises(DataPrepError, match="fits no node"):
        plan_report.report(plan, console, "ray")


@pytest.mark.parametrize("name", ["plan", "verify"])
def test_fresh_is_no_option_of_what_removes_nothing(tree, tmp_path, capsys, name):
    with pytest.raises(SystemExit) as ended:
        command(tree, tmp_path, name, "--fresh")
    assert ended.value.code == 2
    assert f"argument --fresh: {name} removes nothing; it is an option of run" in capsys.readouterr().err
