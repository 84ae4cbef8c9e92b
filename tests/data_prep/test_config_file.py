"""Configuration files: every mistake at once, overrides, defaults, help."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from pydantic import Field

from data_prep.config_file import ConfigError, Section, field_help, load_config, split_arguments, to_yaml


@dataclass(frozen=True)
class Model:
    __pydantic_config__ = {"extra": "forbid"}
    width: int = field(default=3, metadata={"help": "features"})
    activation: Literal["relu", "gelu"] = "relu"

    def __post_init__(self):
        if self.width % 2 == 0:
            raise ValueError("model.width: must be odd\nmodel.width: must be prime")


class Corpus(Section):
    name: str = Field(description="what it is called")
    share: float = Field(0.5, gt=0, lt=1, description="of its records")


class Config(Section):
    corpora: list[Corpus] = Field(default_factory=list)
    model: Model = Model()
    output: str | None = None


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        file = tmp_path / "config.yaml"
        file.write_text(text, encoding="utf-8")
        return load_config(Config, file, overrides)

    return load


def test_every_mistake_is_reported_at_once_with_the_nearest_key(load):
    with pytest.raises(ConfigError) as raised:
        load(
            "corpora: [{name: 3, shar: 2}, {share: 4}]\nmodel: {widht: 3, activation: silu}\nfoo: 1",
            "--output.x.y=1",
        )
    lines = str(raised.value).splitlines()
    assert len(lines) == 8
    text = str(raised.value)
    for expected in (
        "corpora.0.name: input should be a valid string, found 3",
        "corpora.0.shar: unknown key; did you mean 'share'?",
        "corpora.1.name: required key is missing",
        "corpora.1.share: input should be less than 1, found 4",
        "model.widht: unknown key; did you mean 'width'?",
        "model.activation: input should be 'relu' or 'gelu', found 'silu'",
        "foo: unknown key; known keys: corpora, model, output",
    ):
        assert expected in text


def test_problems_a_section_finds_itself_keep_their_key(load):
    with pytest.raises(ConfigError, match="model.width: must be odd; model.width: must be prime"):
        load("model: {width: 4}")


def test_overrides_are_yaml_and_reach_into_lists(load):
    config = load("", "--model.width=5", "corpora=[{name: x}]", "--corpora.0.share=5e-1", "--output=null")
    assert config.model.width == 5 and config.output is None
    assert config.corpora[0].name == "x" and config.corpora[0].share == 0.5


@pytest.mark.parametrize("text", ["[1, 2]", "a: [1", "just text"])
def test_a_file_that_is_no_tree_of_sections_gives_one_line(load, text):
    with pytest.raises(ConfigError) as raised:
        load(text)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {width: 3}\noutput: x\nmodel: {width: 5}",
            "key 'model' stands in line 1 and again in line 3",
        ),
        ("corpora:\n- name: x\n  share: 0.1\n  'name': y", "key 'name' stands in line 2 and again in line 4"),
        ("model: {width: 3, width: 5}", "key 'width' stands in line 1 and again in line 1"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_lines(load, text, message):
    with pytest.raises(ConfigError, match=f"config.yaml: not valid YAML: {message}$"):
        load(text)


def test_a_key_that_stands_twice_in_an_override_is_refused(load):
    with pytest.raises(ConfigError, match="--model={width: 3, width: 5}': the value is not valid YAML"):
        load("", "--model={width: 3, width: 5}")


def test_a_key_that_is_taken_over_from_an_anchor_may_be_given_anew(load):
    text = "corpora:\n- &x {name: x, share: 0.1}\n- &y {<<: *x, name: y}\n- {<<: *y, share: 0.2}"
    assert [(corpus.name, corpus.share) for corpus in load(text).corpora] == [
        ("x", 0.1),
        ("y", 0.1),
        ("y", 0.2),
    ]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such config file"):
        load_config(Config, tmp_path / "nowhere.yaml")


def test_what_is_written_reads_back_the_same(load):
    config = load("corpora: [{name: 法律}]\nmodel: {width: 7}")
    assert load(to_yaml(config)) == config


def test_options_and_overrides_are_told_apart():
    arguments = ["--config", "a.yaml", "--output=x", "--model.width=3", "--executor=local", "file=with.dot"]
    overrides, rest = split_arguments([*arguments, "--outptu=x", "--help"], "config", "executor")
    assert overrides == ["--output=x", "--model.width=3", "--outptu=x"], (
        "load_config says which key was meant"
    )
    assert rest == ["--config", "a.yaml", "--executor=local", "file=with.dot", "--help"]


def test_help_lists_every_key_with_type_default_and_meaning():
    text = field_help(Config)
    assert "corpora[].name  (str, required)  what it is called" in text
    assert "model.width  (int, = 3)  features" in text
    assert "model.activation  (relu|gelu, = relu)" in text


class Run(Section):
    folder: str = "runs"
    steps: int = 1
    rate: float | None = None
    fast: bool = False


class Typed(Run):
    place: str | None = None
    when: str = "12:30"
    names: list[Annotated[str, Field(pattern="^[ab]$")]] = ["a", "b"]


def test_help_shows_types_and_defaults_as_one_types_them(tmp_path):
    shown = dict(line.strip().split("  (", 1) for line in field_help(Typed).splitlines())
    assert shown["place"] == "str or null, = null)" and shown["fast"] == "bool, = false)"
    assert shown["names"] == "list[str], = [a, b])"
    file = tmp_path / "run.yaml"
    file.write_text("")
    defaults = [f"--{key}={text.rpartition(', = ')[2].removesuffix(')')}" for key, text in shown.items()]
    assert load_config(Typed, file, defaults) == Typed()


@pytest.mark.parametrize("text", ["2024-11-29", "12:30", "1:30.5"])
def test_dates_and_clock_times_are_texts(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(f"folder: {text}")
    assert load_config(Run, file).folder == text
    assert load_config(Run, file, [f"--folder={text}"]).folder == text


@pytest.mark.parametrize(
    "override, expected",
    [
        ("--steps=true", "steps: expected a number, found true"),
        ("--rate=true", "rate: expected a number, found true"),
        ("--steps=12:30", "steps: input should be a valid integer"),
        ("--steps=0b_", "the value is not valid YAML"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path, override, expected):
    file = tmp_path / "run.yaml"
    file.write_text("fast: true")
    with pytest.raises(ConfigError, match=expected):
        load_config(Run, file, [override])
    assert load_config(Run, file, ["--steps=1_000", "--rate=1.5"]).steps == 1000
