"""`ray job submit` to a real Ray that asks for a token: code and dependencies arrive, a failure tells its reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import yaml

from tests.data_prep.made import ROOT, content_files, settings
from tests.data_prep.ray_here import ray_here

_RULES = "def shout(text):\n    return None if text.endswith('7') else text.upper()\n"


def test_a_job_brings_code_and_token_and_gives_the_bytes_of_local_processes(corpus, prepared, tmp_path):
    for name in ("code", "mine"):
        (tmp_path / name).mkdir()
    shutil.copytree(ROOT / "data_prep", tmp_path / "code/data_prep")
    (tmp_path / "mine/rules.py").write_text(_RULES)
    tree = settings(
        tmp_path / "out",
        [corpus],
        tokenizer={"load": str(prepared / "tokenizer/tokenizer.model")},
        cleaning={"functions": ["mine.rules:shout"]},  # which the workers only have because the job brings it
        resources={"task_bytes": 1, "workers": 2},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    run = [sys.executable, "-m", "data_prep", "run", "--config", str(tmp_path / "config.yaml")]
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
    records = json.loads((tmp_path / "out/manifest.json").read_bytes())["records"]
    assert records["dropped"] == 300
