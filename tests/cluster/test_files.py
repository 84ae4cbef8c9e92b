"""The files for containers, Ray clusters and Slurm: linters, schemas, and promises they make."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

BINARIES = Path(sys.executable).parent


def run(*command):
    result = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_dockerfile_has_no_findings():
    run(BINARIES / "hadolint", "docker/Dockerfile")


def test_the_container_does_not_run_as_root_and_owns_its_folder():
    """Builders differ in whom they give the folder that WORKDIR makes."""
    text = (ROOT / "docker/Dockerfile").read_text()
    users = [line.split()[1] for line in text.splitlines() if line.startswith("USER")]
    assert users and users[-1] not in ("root", "0")
    (folder,) = re.findall(r"^WORKDIR (\S+)", text, flags=re.M)
    assert f"install --directory --owner=sutrain --group=sutrain {folder}\n" in text.partition("\nUSER ")[0]


def test_everything_the_dockerfile_copies_is_there():
    for line in (ROOT / "docker/Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            sources = [word for word in line.split()[1:-1] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), line


def test_a_change_of_the_sources_does_not_set_the_image_up_again(tmp_path):
    """What is copied before the set-up is what it needs, and not the rest."""
    before = (ROOT / "docker/Dockerfile").read_text().partition("RUN make setup")[0]
    for line in before.splitlines():
        if line.startswith("COPY"):
            *sources, place = [word for word in line.split()[1:] if not word.startswith("--")]
            (tmp_path / place).mkdir(exist_ok=True)
            for source in sources:
                shutil.copy(ROOT / source, tmp_path / place)  # single files: a folder cannot be copied so
    wanted = subprocess.run(["make", "--dry-run", "setup"], cwd=tmp_path, capture_output=True, text=True)
    assert wanted.returncode == 0 and "-m sutrain.build_extension" in wanted.stdout, wanted.stderr
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    alone = "import data_prep, sutrain.build_extension as built; print(built.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", alone], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / "sutrain/build_extension.py"), done.stderr


def test_shell_scripts_have_no_findings():
    run(BINARIES / "shellcheck", "cluster/slurm/pretrain.sbatch", "scripts/check_prerequisites.sh", ".ci/run")


@pytest.fixture
def ray_cluster():
    return yaml.safe_load((ROOT / "cluster/ray/cluster.yaml").read_text())


def test_the_ray_cluster_fits_rays_schema(ray_cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(ray_cluster))
    provider = ray_cluster["provider"]
    assert ray_cluster["min_workers"] == ray_cluster["max_workers"] == len(provider["worker_ips"])
    head, worker = (ray_cluster[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    assert f"--node-ip-address={provider['head_ip']} " in head and "RAY_enable_autoscaler_v2=0" in head
    assert "RAY_AUTH_MODE=disabled" in head and "RAY_AUTH_MODE=disabled" in worker


@pytest.fixture
def as_ray_runs_it(tmp_path):
    """Runs a command as Ray does by ssh, in a home where `make setup` made .venv, with a ray that tells its arguments
    and limit of open files."""
    from ray.autoscaler._private.command_runner import _with_interactive

    binaries = tmp_path / "sutrain/.venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "ray").write_text('#!/bin/sh\necho "$@" with $(ulimit -n) files\n')
    (binaries / "ray").chmod(0o755)
    (binaries / "python").symlink_to(sys.executable)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.1"}

    def run(command, before=""):
        shell = before + " ".join(_with_interactive(command))
        return subprocess.run(
            ["bash", "-c", shell], env=environment, capture_output=True, text=True, start_new_session=True
        )

    return run


def test_the_set_up_of_a_host_has_every_command_of_ray_find_its_environment(
    ray_cluster, as_ray_runs_it, tmp_path
):
    """Those of the file, what `ray down` says by itself, and the python of jobs."""
    assert as_ray_runs_it("ray stop").returncode == 127
    for _ in range(2):
        for command in ray_cluster["setup_commands"]:
            assert as_ray_runs_it(command).returncode == 0
    assert (tmp_path / ".bashrc").read_text().count("\n") == 1
    commands = ray_cluster["head_start_ray_commands"] + ray_cluster["worker_start_ray_commands"]
    assert len(commands) == 4
    few = "ulimit -n 999 && ulimit -Sn 500 &&"  # open files that a host may allow; root may ask for more
    for command in ["ray stop", *commands]:
        done = as_ray_runs_it(command, before=few)
        assert done.returncode == 0 and done.stdout.startswith(("start", "stop")), done.stderr
        if done.stdout.startswith("start"):
            assert done.stdout.endswith(("with 999 files\n", "with 65536 files\n"))
    assert as_ray_runs_it("command -v python").stdout.strip() == str(tmp_path / "sutrain/.venv/bin/python")


def test_a_worker_that_the_head_does_not_know_is_named_before_ray_starts(
    ray_cluster, as_ray_runs_it, tmp_path
):
    commands = ray_cluster["setup_commands"] + ray_cluster["head_setup_commands"]
    for workers, code, told in (
        (["localhost", "127.0.0.1"], 0, ""),
        (["localhost", "no-such-host.invalid"], 1, "the head does not know no-such-host.invalid"),
    ):
        bootstrap = {"provider": {"worker_ips": workers}}
        (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(bootstrap))
        done = [as_ray_runs_it(command) for command in commands]
        assert (done[-1].returncode, told in done[-1].stdout) == (code, True), done


def test_the_set_up_brings_the_client_of_s3():
    """The pages promise s3:// to whoever ran `make setup`, which the image does too."""
    assert "make setup" in (ROOT / "docker/Dockerfile").read_text()
    setup = subprocess.run(
        ["make", "--dry-run", "--always-make", "setup"], cwd=ROOT, capture_output=True, text=True
    )
    assert "-c constraints.txt -e '.[s3]'" in setup.stdout


def test_jobs_are_sent_to_where_ray_listens_and_the_token_is_made_as_the_page_says(tmp_path):
    pages = [(ROOT / page).read_text() for page in ("docs/data_prep.md", "docs/getting_started.md")]
    for page in pages:
        addresses = re.findall(r"ray job submit --address (\S+)", page)
        assert addresses and set(addresses) == {"http://127.0.0.1:8265"}
    made = re.search(r"^(\(umask 077; ray get-auth-token .*\))  ", pages[0], flags=re.M)
    environment = {"HOME": str(tmp_path), "PATH": f"{BINARIES}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", made[1]], env=environment, check=True, capture_output=True)
    token = tmp_path / ".ray/auth_token"
    assert len(token.read_text()) >= 32 and token.stat().st_mode & 0o777 == 0o600


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
