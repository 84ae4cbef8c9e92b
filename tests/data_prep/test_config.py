"""The shipped configurations, help, and paths that a Ray job would lose."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.config import PrepareConfig, _paths, load
from data_prep.config_file import ConfigError, field_help, to_yaml
from data_prep.places import lost_with_a_ray_package
from tests.data_prep.made import ROOT, command_line, make_texts, settings, write_jsonl


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_configurations_parse_and_every_line_is_commented(path: Path):
    assert "paths" in to_yaml(load(path, []))
    lines = [line for line in path.read_text().splitlines() if line.strip() and line.strip()[0] != "#"]
    assert [line for line in lines if "#" not in line and not line.endswith(":")] == []


def test_every_key_has_a_description():
    for line in field_help(PrepareConfig).splitlines():
        key, _, rest = line.partition("  (")
        assert len(rest.partition(")  ")[2]) > 20, key


def test_relative_paths_in_a_ray_job_are_refused(tmp_path, monkeypatch):
    config = PrepareConfig.model_validate(
        settings(Path("out"), ["raw/*.jsonl", "/data/x.jsonl", "s3://raw/y.jsonl", "file:///data/z.jsonl"])
    )
    assert lost_with_a_ray_package(_paths(config), "/home/me/project") == []
    inside = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    problems = lost_with_a_ray_package(_paths(config), str(inside))
    assert [problem.split(":")[0] for problem in problems] == ["output_dir", "corpora.0.paths.0"]
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    with pytest.raises(ConfigError, match="temporary copy of its working directory"):
        load(path, [])


def test_plan_shows_the_input_and_writes_nothing(tmp_path):
    source = write_jsonl(tmp_path / "raw" / "a.jsonl", make_texts(50))
    (source.parent / "notes.md").write_text("not text to train on")
    result = command_line(settings(tmp_path / "out", [source.parent]), tmp_path, "plan")
    assert result.returncode == 0, result.stderr
    shown = "".join(result.stdout.split())  # long paths are wrapped
    assert "made" in shown and "notes.md" in shown and not (tmp_path / "out").exists()


def test_names_that_collide_are_refused(tmp_path):
    for folder in "ab":
        write_jsonl(tmp_path / folder / "same.jsonl", make_texts(5))
    tree = settings(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    result = command_line(tree, tmp_path, "plan")
    assert result.returncode == 2 and "same relative name" in result.stderr
    tree["corpora"][0]["root"] = str(tmp_path)
    assert command_line(tree, tmp_path, "plan").returncode == 0


def test_adopting_a_model_without_loading_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adopt: true is for a model that is loaded; give load"):
        PrepareConfig.model_validate(settings(tmp_path / "out", ["raw"], tokenizer={"adopt": True}))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_paragraphs_of_a_format_that_has_none_are_refused(tmp_path, kind):
    tree = settings(tmp_path / "out", ["raw"])
    tree["corpora"][0] |= {"format": kind, "records": "paragraph"}
    with pytest.raises(ValueError, match=f"records: paragraph is for txt, and format is {kind}"):
        PrepareConfig.model_validate(tree)
