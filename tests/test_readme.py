"""The README: its commands are those that exist (tests/cluster/test_demo.py runs them), its links lead somewhere."""

import json
import os
import re
import shutil
import subprocess

import pytest

from benchmarks.results import FOLDER, MISSED, SIGNS, verdict
from tests.conftest import ROOT


def commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_the_readme_has_the_two_commands_and_the_road():
    lines = commands("README.md")
    assert lines[:2] == ["make demo", "make test"]
    assert sum(line.startswith(("python -m", "deepspeed")) for line in lines) >= 9


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "lint", "clean", "help"])
def test_every_make_target_is_there(target):
    result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_make_help_lists_the_targets():
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    for target in ("demo", "test", "test-slow", "lint", "clean"):
        assert f"make {target} " in result.stdout


def test_another_torch_is_installed_when_it_is_asked_for_and_never_else(tmp_path):
    """With a python that only says what it was asked to do."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    program = tmp_path / ".venv/bin/python"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    (tmp_path / ".venv/.created").touch()

    def setup(*torch):
        environment = {
            name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS")
        }
        command = ["make", "setup", *torch]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return [line for line in done.stdout.splitlines() if " torch" in line or "build_extension" in line]

    first = setup()
    assert "torch==2.13.0" in first[0] and "-m sutrain.build_extension" in first[-1]
    assert setup() == []
    cpu = "TORCH=torch==2.13.0 --index-url https://example.org/cpu"
    changed = setup(cpu)
    assert any(line.startswith("-m pip uninstall") for line in changed)
    assert any(line.startswith("-m pip install") and line.endswith(cpu[6:]) for line in changed)
    assert changed[-1] == "-m sutrain.build_extension"
    assert setup(cpu) == setup() == []


def test_no_page_has_an_unfilled_place():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"@[A-Z_]{3,}@", page.read_text()), page.name


def test_links_between_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "LOG.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_the_measured_figures_are_those_of_the_benchmarks():
    files = [json.loads(path.read_text()) for path in FOLDER.glob("*.json")]
    measured = {entry["name"]: entry for file in files for entry in file["results"]}
    rows = re.findall(
        r"^\|[^|]*\| `(\w+)` \| ([\d.]+) \| (.*) \|$", (ROOT / "README.md").read_text(), flags=re.M
    )
    assert len(rows) >= 9
    for name, value, goal in rows:
        entry, digits = measured[name], len(value.partition(".")[2])
        missed = ", missed" if verdict(entry).startswith(MISSED) else ""
        assert float(value) == round(entry["value"], digits), name
        assert goal == f"{SIGNS[entry['better']]} {entry['goal']:g}{missed}", name
