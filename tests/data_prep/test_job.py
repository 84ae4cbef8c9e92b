"""`ray job submit` to a real Ray that asks for a token: code and dependencies arrive, a failure tells its reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml

from tests.data_prep.made import ROOT, content_files, settings
from tests.data_prep.ray_here import ray_here

_RULES = "def shout(text):\n    return None if text.endswith('7') else text.upper()\n"


def job_with(function, corpus, prepared, tmp_path):
    """The arguments of a run that cleans with `function`; tmp_path/code is what the job brings, /out its data set."""
    shutil.copytree(ROOT / "data_prep", tmp_path / "code/data_prep")
    tree = settings(
        tmp_path / "out",
        [corpus],
        tokenizer={"load": str(prepared / "tokenizer/tokenizer.model")},
        cleaning={"functions": [function]},  # which the workers only have because the job brings it
        resources={"task_bytes": 1, "workers": 2},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return ["-m", "data_prep", "run", "--config", str(tmp_path / "config.yaml")]


def dropped(tmp_path):
    return json.loads((tmp_path / "out/manifest.json").read_bytes())["records"]["dropped"]


def test_a_job_brings_code_and_token_and_gives_the_bytes_of_local_processes(corpus, prepared, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/rules.py").write_text(_RULES)
    run = [sys.executable, *job_with("mine.rules:shout", corpus, prepared, tmp_path)]
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    (tmp_path / "other").write_text("f" * 64)
    brings = ["--runtime-env-json", json.dumps({"py_modules": [str(tmp_path / "mine")]})]
    authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    with ray_here(tmp_path / "ray.log", **authentication) as ray:
        refused = ray.submit(
            tmp_path / "code", [*run, "--executor=ray"], RAY_AUTH_TOKEN_PATH=str(tmp_path / "other")
        )
        assert refused.returncode != 0 and not (tmp_path / "out").exists(), refused.stdout
        lost = ray.submit(tmp_path / "code", [*run, "--executor=ray", "--output_dir=out"], *brings)
        assert lost.returncode != 0
        assert (
            "is relative, but a Ray job runs in a temporary copy" in lost.stdout.split("Status message")[-1]
        )
        done = ray.submit(tmp_path / "code", [*run, "--executor=ray"], *brings)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out/run.json").read_bytes())["executor"] == "ray"
    local = [*run, f"--output_dir={tmp_path / 'local'}"]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    subprocess.run(local, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True)
    assert content_files(tmp_path / "out") == content_files(tmp_path / "local")
    assert dropped(tmp_path) == 300


def wheel_of(folder, name, code):
    """A package of one module, as pip installs it."""
    information = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": code,
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for place, content in files.items():
            archive.writestr(place, content)
        archive.writestr(f"{information}/RECORD", "".join(f"{place},,\n" for place in files))
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_brings_packages_by_pip(corpus, prepared, tmp_path):
    wheel = wheel_of(tmp_path, "rules_by_pip", _RULES)
    # `python`, not this one: the environment that Ray makes for the job has one of its own.
    run = ["python", *job_with("rules_by_pip:shout", corpus, prepared, tmp_path), "--executor=ray"]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    with ray_here(tmp_path / "ray.log", RAY_AUTH_MODE="disabled", PATH=path) as ray:
        brings = ["--runtime-env-json", json.dumps({"pip": [str(wheel)]})]
        done = ray.submit(tmp_path / "code", run, *brings)
        assert done.returncode == 0, done.stdout + done.stderr
    assert dropped(tmp_path) == 300
