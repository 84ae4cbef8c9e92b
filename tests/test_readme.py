"""The README: its commands are those that exist (tests/cluster/test_demo.py runs them), its links lead somewhere."""

import json
import re
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
        missed = ", missed" if verdict(entry) == MISSED else ""
        assert float(value) == round(entry["value"], digits), name
        assert goal == f"{SIGNS[entry['better']]} {entry['goal']:g}{missed}", name
