"""The files for containers, Ray clusters and Slurm: linters, schemas, and promises they make."""

import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import ROOT

BINARIES = Path(sys.executable).parent


def run(*command):
    result = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_dockerfile_has_no_findings():
    run(BINARIES / "hadolint", "docker/Dockerfile")


def test_the_container_does_not_run_as_root():
    users = [
        line.split()[1]
        for line in (ROOT / "docker/Dockerfile").read_text().splitlines()
        if line.startswith("USER")
    ]
    assert users and users[-1] not in ("root", "0")


def test_everything_the_dockerfile_copies_is_there():
    for line in (ROOT / "docker/Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            sources = [word for word in line.split()[1:-1] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), line


def test_shell_scripts_have_no_findings():
    run(BINARIES / "shellcheck", "cluster/slurm/pretrain.sbatch", "scripts/check_prerequisites.sh", ".ci/run")


def test_the_ray_cluster_fits_rays_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((ROOT / "cluster/ray/cluster.yaml").read_text())
    validate_config(prepare_config(cluster))
    started = " ".join(cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"])
    assert started.count("RAY_AUTH_MODE=disabled ray start") == 2


def test_the_slurm_script_wants_a_configuration():
    result = subprocess.run(
        ["bash", "cluster/slurm/pretrain.sbatch"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and "which configuration?" in result.stderr


def test_missing_prerequisites_are_named_in_one_line(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    command = ["/bin/bash", "scripts/check_prerequisites.sh"]
    result = subprocess.run(command, cwd=ROOT, env={"PATH": str(empty)}, capture_output=True, text=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 1 and len(lines) == 1
    assert "g++" in lines[0] and "python3-venv" in lines[0] and "apt-get install" in lines[0]
