"""A run removes only what it wrote, takes up only what is its own, and never mixes with the input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_prep import owned, run, sample, scatter
from data_prep.errors import AuditError, DataPrepError
from data_prep.files import TEMPORARY_MARK
from data_prep.shards import Manifest
from tests.data_prep.made import command_line, content_files, make_texts, prepare, settings, write_jsonl


@pytest.fixture
def tree(tmp_path) -> dict:
    return settings(tmp_path / "out", [write_jsonl(tmp_path / "raw" / "a.jsonl", make_texts(300))])


class KilledError(Exception):
    """Stands for the end of the process."""


def kill_at(monkeypatch, module, name: str, after: int = 0) -> None:
    """The run ends when it calls `module.name` for the time after `after`."""
    original, calls = getattr(module, name), []

    def stop(*arguments, **named):
        calls.append(1)
        if len(calls) > after:
            raise KilledError
        return original(*arguments, **named)

    monkeypatch.setattr(module, name, stop)


def test_files_of_others_in_the_work_folder_stay(tree, tmp_path):
    work = tmp_path / "scratch"
    (work / "scatter").mkdir(parents=True)
    for name in ("thesis.md", "scatter/task-000000.json", "notes.tmp-012345678901"):
        (work / name).write_text("mine")
    prepare(tree | {"work_dir": str(work)})
    prepare(tree | {"work_dir": str(work)}, fresh=True)
    found = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
    assert found == ["notes.tmp-012345678901", "scatter/task-000000.json", "thesis.md"]
    assert not list(work.glob(".sutrain-*"))


def test_files_of_others_in_the_output_stay(tree, tmp_path):
    prepare(tree)
    mine = [
        tmp_path / "out" / name for name in ("notes.md", "train/raw.txt", "x.tmp-012345678901", ".work/y")
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    prepare(tree, fresh=True)
    prepare(tree | {"seed": 6}, fresh=True)
    assert all(path.read_text() == "mine" for path in mine)
    assert command_line(tree | {"seed": 6}, tmp_path, "verify").returncode == 0


def test_what_a_killed_worker_left_is_gone_when_the_run_ends(tree, tmp_path, monkeypatch):
    gather = run.run_gather

    def and_a_worker_dies(*arguments):
        results = gather(*arguments)
        left = tmp_path / "out" / "train" / f"shard-000000.tar{TEMPORARY_MARK}0123456789ab"
        left.write_bytes(b"half")
        return results

    monkeypatch.setattr(run, "run_gather", and_a_worker_dies)
    prepare(tree)
    assert not list((tmp_path / "out").rglob(f"*{TEMPORARY_MARK}*"))


def test_what_a_killed_run_left_is_gone_before_the_run_goes_on(tree, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, run, "run_gather")
        with pytest.raises(KilledError):
            prepare(tree)
    (work,) = (Path(tree["output_dir"]) / ".work").iterdir()
    left = [
        work / folder / f"task-000001.spill{TEMPORARY_MARK}0123456789ab" for folder in ("scatter", "merge-1")
    ]
    left.append(
        Path(tree["output_dir"]) / f".seen{TEMPORARY_MARK}0123456789ab"
    )  # which the nodes of a Ray looked for
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    kill_at(monkeypatch, run, "run_scatter")
    with pytest.raises(KilledError):
        prepare(tree)
    assert not any(path.exists() for path in left) and (work / "scatter" / "task-000000.json").exists()


@pytest.mark.parametrize("name", ["train/corpus.txt", "tokenizer/my.model", "manifest.json", "run.json"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_others_is_refused_and_not_cleared(tree, tmp_path, name, fresh):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(DataPrepError, match="which no run of data_prep wrote; take another output_dir$"):
        prepare(tree, fresh=fresh)
    assert path.read_text() == "{}"


@pytest.mark.parametrize(
    ("output", "work", "paths", "message"),
    [
        ("raw", None, ["raw"], "output_dir: "),
        ("raw/sub", None, ["raw"], "output_dir: "),
        (".", None, ["raw/a.jsonl"], "output_dir: "),
        ("out", "raw/work", ["raw"], "work_dir: "),
        ("out", "out", ["raw"], "work_dir: "),
        ("out", "out/deep/work", ["raw"], "work_dir: "),
        ("out/deep", "out", ["raw"], "work_dir: "),
        ("raw/out", None, ["raw/**/*.jsonl"], "output_dir: "),
        ("link", None, ["raw"], "output_dir: "),
    ],
)
def test_input_output_and_work_must_lie_apart(tree, tmp_path, output, work, paths, message):
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    tree["corpora"][0]["paths"] = [str(tmp_path / path) for path in paths]
    tree |= {"output_dir": str(tmp_path / output), "work_dir": work and str(tmp_path / work)}
    with pytest.raises(DataPrepError, match=f"^{message}.* lie in one another; take a folder apart$"):
        prepare(tree, fresh=True)
    assert (tmp_path / "raw" / "a.jsonl").exists() and not (tmp_path / "raw" / "plan.json").exists()


def test_the_default_work_folder_may_be_named(tree, tmp_path):
    prepare(tree | {"work_dir": str(tmp_path / "out" / ".work")})


def test_a_shared_work_folder_mixes_no_runs(tree, tmp_path, monkeypatch):
    """Two killed runs over corpora of equal size leave their work in one folder; each goes on with its own."""
    other = write_jsonl(tmp_path / "raw" / "b.jsonl", make_texts(300, seed=1))
    other.write_bytes((tmp_path / "raw" / "a.jsonl").read_bytes()[::-1].translate(None) or b"")
    lines = (tmp_path / "raw" / "a.jsonl").read_text().splitlines()
    other.write_text("\n".join(line.replace("法", "权") for line in lines) + "\n")
    trees = [
        tree | {"work_dir": str(tmp_path / "scratch")},
        settings(tmp_path / "out2", [other]) | {"work_dir": str(tmp_path / "scratch")},
    ]
    with monkeypatch.context() as patch:
        kill_at(patch, run, "run_gather")
        for one in trees:
            with pytest.raises(KilledError):
                prepare(one)
    assert len(list((tmp_path / "scratch").iterdir())) == 2
    for number, one in enumerate(trees):
        prepare(one)
        alone = tmp_path / f"alone{number}"
        prepare(one | {"output_dir": str(alone), "work_dir": None})
        assert content_files(Path(one["output_dir"])) == content_files(alone)


def test_another_work_dir_begins_anew_and_says_what_that_costs(tree, tmp_path, monkeypatch, capsys):
    first, second = ({"work_dir": str(tmp_path / name)} for name in ("first", "second"))
    with monkeypatch.context() as patch:
        kill_at(patch, run, "run_gather")
        with pytest.raises(KilledError):
            prepare(tree | first)
    (old,) = (tmp_path / "first").iterdir()
    prepare(tree | second)
    told = f"pass 1 begins anew in {tmp_path / 'second' / old.name}: 1 finished task(s) in {old} are removed"
    assert told in capsys.readouterr().err and not old.exists()


def test_finished_parts_of_another_run_or_tokenizer_are_not_taken_up(tree, tmp_path, monkeypatch):
    from dataclasses import replace

    seen = {}
    for name in ("collect_sample", "scatter"):
        original = getattr(run, name)
        monkeypatch.setattr(
            run,
            name,
            lambda task, original=original, name=name: seen.setdefault(name, task) and original(task),
        )
    kill_at(monkeypatch, run, "run_gather")
    kill_at(monkeypatch, run.shutil, "rmtree")
    with pytest.raises(KilledError):
        prepare(tree)
    assert sample.finished_sample(seen["collect_sample"]) is not None
    assert sample.finished_sample(replace(seen["collect_sample"], run_hash="other")) is None
    monkeypatch.undo()
    kill_at(monkeypatch, run, "run_gather")
    monkeypatch.setattr(
        run, "scatter", lambda task: seen.setdefault("scatter", task) and scatter.scatter(task)
    )
    with pytest.raises(KilledError):
        prepare(tree)
    assert scatter.finished_scatter(seen["scatter"]) is not None
    for change in ({"run_hash": "other"}, {"tokenizer_sha256": "other"}):
        assert scatter.finished_scatter(replace(seen["scatter"], **change)) is None


@pytest.mark.parametrize("step", range(6))
def test_fresh_killed_at_any_step_leaves_nothing_that_looks_finished(tree, tmp_path, monkeypatch, step):
    first = prepare(tree)
    for name in ("unlink", "rmdir"):
        original = getattr(Path, name)
        calls = []

        def stop(self, *arguments, original=original, calls=calls, **named):
            if ".owner" in self.parts:
                return original(self, *arguments, **named)
            if "out" in self.parts and len(calls) >= 2 * step + 1:
                raise KilledError
            calls.append(self)
            return original(self, *arguments, **named)

        monkeypatch.setattr(Path, name, stop)
    with pytest.raises(KilledError):
        prepare(tree, fresh=True)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare(tree).content_hash == first.content_hash


def test_a_finished_output_is_looked_at_again(tree, tmp_path):
    prepare(tree)
    work = Path(json.loads((tmp_path / "out" / "plan.json").read_text())["work"])
    work.mkdir(parents=True)
    (work / "left.over").write_text("by a run killed at its very end")
    prepare(tree)
    assert not (tmp_path / "out" / ".work").exists()
    shard = tmp_path / "out" / "train" / "shard-000000.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    with pytest.raises(AuditError, match=r"train/shard-000000.tar is gone or has another size; .* --fresh"):
        prepare(tree)
    prepare(tree, fresh=True)
    assert Manifest.load(tmp_path / "out").directory and not owned._entries(tmp_path / "nowhere")


def test_input_that_is_gone_does_not_cost_the_finished_output(tree, tmp_path):
    prepare(tree)
    (tmp_path / "raw" / "a.jsonl").unlink()
    with pytest.raises(DataPrepError, match="no such file"):
        prepare(tree, fresh=True)
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("section", "mistake"),
    [("tokenizer", {"load": "/nowhere.model"}), ("cleaning", {"functions": ["nowhere:f"]})],
)
def test_a_mistake_found_at_the_start_leaves_a_folder_that_the_mended_command_can_use(
    tree, tmp_path, section, mistake
):
    with pytest.raises(DataPrepError, match="nowhere"):
        prepare(tree | {section: tree[section] | mistake})
    assert not (tmp_path / "out").exists()
    prepare(tree)


def test_a_refused_run_leaves_the_files_of_others_that_are_named_like_its_own(tree, tmp_path):
    (tmp_path / "out").mkdir()
    mine = [tmp_path / "out" / name for name in ("progress.json", "metrics.prom")]
    for path in mine:
        path.write_text("mine")
    with pytest.raises(DataPrepError, match=r"holds progress.json, metrics.prom, which no run"):
        prepare(tree)
    assert all(path.read_text() == "mine" for path in mine)


def data_in(output: Path) -> dict[Path, bytes]:
    """Every file but those that tell who owns the folder."""
    files = [path for path in output.rglob("*") if path.is_file() and ".owner" not in path.parts]
    return {path: path.read_bytes() for path in files}


def test_text_that_is_finished_or_half_done_is_not_given_up_for_changed_input(tree, tmp_path, monkeypatch):
    """Text has no tokenizer that would show how far a run had come."""
    tree["shards"]["content"] = "text"
    with monkeypatch.context() as patch:
        kill_at(patch, run, "run_gather")
        with pytest.raises(KilledError):
            prepare(tree)
    refused = r"was begun with other settings or input:\n(.*\n)+.* start over with --fresh$"

    def refused_without_a_loss() -> None:
        before = data_in(tmp_path / "out")
        with pytest.raises(DataPrepError, match=refused):
            prepare(tree | {"seed": 6})
        assert before and data_in(tmp_path / "out") == before

    refused_without_a_loss()
    first = prepare(tree)
    refused_without_a_loss()
    write_jsonl(tmp_path / "raw" / "b.jsonl", make_texts(5, seed=2))
    tree["corpora"][0]["paths"] = [str(tmp_path / "raw")]
    refused_without_a_loss()
    assert prepare(tree, fresh=True).content_hash != first.content_hash
