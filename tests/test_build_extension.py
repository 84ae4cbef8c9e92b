"""The communication extension: built once, loaded without a compiler, and nothing that waits for ever."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

NAME = "deepspeed_shm_comm"
BUILD = "from sutrain.build_extension import build_extension; build_extension({arguments}); "
# One rank alone: DeepSpeed starts, reduces, and says whether it holds the extension.
REDUCE = (
    "import os, socket, torch, deepspeed, deepspeed.comm as dist; "
    "s = socket.socket(); s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]; s.close(); "
    "os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', LOCAL_SIZE='1', "
    "MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)); "
    "from sutrain.build_extension import start_communication; start_communication('gloo'); "
    "x = torch.ones(3); dist.all_reduce(x); assert x.sum() == 3; "
    "from deepspeed.comm import comm; print('extension', comm.cdb.shm_comm_op is not None); "
    "from pathlib import Path; print('left', *Path('/dev/shm').glob(f'deepspeed_allreduce_buffer_*_{port}_*'))"
)


def python(program: str, *, folder: Path | None = None, path: str | None = None, seconds: float = 120):
    environment = {key: value for key, value in os.environ.items() if key not in ("TORCH_EXTENSIONS_DIR",)}
    environment |= {"DEEPSPEED_LOG_LEVEL": "error", "OMP_NUM_THREADS": "1"}
    if folder is not None:
        environment["TORCH_EXTENSIONS_DIR"] = str(folder)
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def only(tools: dict[str, str], folder: Path) -> str:
    """A PATH with nothing but these scripts."""
    folder.mkdir()
    for name, text in tools.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.fixture(scope="module")
def built() -> Path:
    """The environment's own extension folder, with the extension in it."""
    result = python(BUILD.format(arguments=""), seconds=400)
    assert result.returncode == 0, result.stderr
    folder = Path(sys.prefix) / "torch_extensions" / NAME
    assert (folder / f"{NAME}.so").is_file()
    return folder


def test_what_was_built_is_loaded_without_compiler_and_ninja(built, tmp_path):
    result = python(BUILD.format(arguments="") + REDUCE, path=only({}, tmp_path / "bin"))
    assert result.returncode == 0, result.stderr
    assert "extension True" in result.stdout
    assert result.stdout.splitlines()[-1].strip() == "left", "shared memory that outlives its process"


def test_without_a_compiler_one_line(tmp_path):
    result = python(BUILD.format(arguments=""), folder=tmp_path / "x", path=only({}, tmp_path / "bin"))
    assert result.returncode != 0
    assert "no C++ compiler" in result.stderr.splitlines()[-1] and "apt-get install g++" in result.stderr


def test_one_built_for_something_else_is_not_loaded(built, tmp_path):
    shutil.copytree(built, tmp_path / NAME)
    stamp = json.loads((tmp_path / NAME / "built.json").read_text())
    (tmp_path / NAME / "built.json").write_text(json.dumps({**stamp, "torch": "1.0"}))
    result = python(BUILD.format(arguments=""), folder=tmp_path, path=only({}, tmp_path / "bin"))
    assert "no C++ compiler" in result.stderr


def test_a_lock_left_by_a_killed_build_does_not_stop_the_next(built, tmp_path):
    shutil.copytree(
        built, tmp_path / NAME
    )  # with its object files and their times: nothing is compiled again
    (tmp_path / NAME / "built.json").unlink()
    (tmp_path / NAME / "lock").touch()
    result = python(BUILD.format(arguments="60") + REDUCE, folder=tmp_path, seconds=100)
    assert result.returncode == 0, result.stderr
    assert "extension True" in result.stdout
    assert (tmp_path / NAME / "built.json").is_file()


def test_a_build_that_hangs_is_stopped_and_training_goes_on_with_gloo(tmp_path):
    marker, path = hanging_compiler(tmp_path)
    program = "import time; " + BUILD.format(arguments="15") + REDUCE
    first = python(program, folder=tmp_path / "x", path=path)
    assert first.returncode == 0, first.stderr
    assert "warning: building DeepSpeed's communication extension did not end within 15 s" in first.stderr
    assert "most recent call first" in first.stderr, "where it hung is not shown"
    assert "extension False" in first.stdout
    assert not compiling(marker), "the hanging compiler still runs"

    stamp = tmp_path / "x" / NAME / "timed_out.json"
    stamped = stamp.stat().st_mtime_ns
    second = python(program, folder=tmp_path / "x", path=path)
    assert second.returncode == 0 and "timed out before" in second.stderr
    assert stamp.stat().st_mtime_ns == stamped, "a later start tried and waited again"


def test_a_build_ends_with_the_process_that_started_it(tmp_path):
    """Kill -9 of a rank while it builds: compilers that go on would write into the next start's build."""
    marker, path = hanging_compiler(tmp_path)
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "x"), "PATH": path}
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD.format(arguments="100")], cwd=ROOT, env=environment
    )
    wait_until(lambda: compiling(marker), "no compiler was started")
    process.kill()
    process.wait()
    wait_until(lambda: not compiling(marker), "the compiler outlives the process that wanted it")


def wait_until(condition, complaint: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.1)


def hanging_compiler(folder: Path) -> tuple[str, str]:
    """(a word of the command line of everything it starts, a PATH with a compiler that never ends)."""
    marker = f"{int(time.time())}.{os.getpid()}"
    compiler = f"#!/bin/sh\ncase $1 in -dump*) echo 12.2.0;; *) exec /bin/sleep {marker};; esac\n"
    return marker, only({"g++": compiler, "c++": compiler}, folder / "bin") + ":/usr/bin:/bin"


def compiling(marker: str) -> list[Path]:
    """The compilers with that marker that run."""
    return [
        entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and marker in _command_line(entry)
    ]


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
