"""The supervisor with real processes: restarts, gives up, notices hangs, passes signals on, leaves nothing behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from data_prep.config_file import Section, load_config
from sutrain import heartbeat
from sutrain.config import HomePath
from sutrain.launch import hold_run_folder
from sutrain.supervise import Supervisor, main, run_folder
from tests.conftest import ROOT, environment

# A launcher that, as DeepSpeed's, starts a rank in a group of its own and hands no signal down.
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], start_new_session=True)
sys.exit(rank.wait())
"""

# A rank that counts its starts and does what the n-th word on its command line says.
RANK = """
import os, pathlib, signal, subprocess, sys, time, zlib
from sutrain import heartbeat
run = pathlib.Path(sys.argv[1].partition("=")[2])
plan = sys.argv[2:]
starts = run / "starts"
number = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(number + 1))
todo = plan[min(number, len(plan) - 1)]
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), (run / "saved").write_text(""), os._exit(0)))
signal.signal(signal.SIGUSR1, lambda *_: (run / "usr1").write_text(""))
mark = f"0.{zlib.crc32(str(run).encode())}"  # by which the test knows its own
subprocess.Popen(["sleep", "600", mark], start_new_session=True)  # what a crash leaves behind
heartbeat.start(run, 0, {os.environ.get(heartbeat.MARK, "")})
def checkpoint():
    (run / f"checkpoints/step-{number + 1:08d}").mkdir(parents=True)
if todo == "crash": os.kill(os.getpid(), signal.SIGKILL)
if todo == "progress": checkpoint(); sys.exit(1)
if todo == "mistake": sys.exit(2)
if todo == "stopped itself": checkpoint(); sys.exit(3)
if todo == "late mistake":
    heartbeat.beat("training step", 7)
    time.sleep(3)
    sys.exit(2)
if todo == "hang":
    heartbeat.beat("training step", 7)
    time.sleep(600)
if todo == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
while todo in ("work", "deaf"):
    heartbeat.beat("training step", 7)
    time.sleep(0.1)
print("done")
"""


# What DeepSpeed's does when a signal ends its helper process.
LAUNCHER_THAT_LEAVES = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], start_new_session=True)
time.sleep(3)
"""


def supervise(run_dir, *plan, restarts=3, hang_seconds=60, grace_seconds=120, launcher=LAUNCHER, before=()):
    command = [sys.executable, "-m", "sutrain.supervise", f"--restarts={restarts}", "--pause_seconds=0.1"]
    command += [
        f"--hang_seconds={hang_seconds}",
        f"--grace_seconds={grace_seconds}",
        "--",
        sys.executable,
        "-c",
        launcher,
        RANK,
    ]
    return subprocess.Popen(
        [*before, *command, f"--run_dir={run_dir}", *plan], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process):
    """(exit status, output) of a supervisor that must end, and leave no process that it started."""
    output = process.communicate(timeout=90)[0]
    return process.returncode, output


def events(run_dir):
    return [json.loads(line) for line in (run_dir / "supervise.jsonl").read_text().splitlines()]


def left_behind(run_dir):
    mark = ["sleep", "600", f"0.{zlib.crc32(str(run_dir).encode())}"]
    return [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == mark]


@pytest.fixture
def sleepers(tmp_path):
    """Whatever the ranks of the test started must be gone in the end."""
    yield
    assert not left_behind(tmp_path), "the supervisor left processes behind"


def test_a_crash_is_followed_by_a_restart_and_the_end_by_nothing(tmp_path, sleepers):
    status, output = finish(supervise(tmp_path, "crash", "crash", "end"))
    assert status == 0, output
    assert [event["event"] for event in events(tmp_path)] == ["start", "restart"] * 2 + ["start", "end"]
    pauses = [event["pause_seconds"] for event in events(tmp_path) if event["event"] == "restart"]
    assert pauses == [0.1, 0.2], "pauses grow"
    assert "done" in output


def test_it_gives_up_after_so_many_starts_without_a_checkpoint(tmp_path, sleepers):
    status, output = finish(supervise(tmp_path, "crash", restarts=2))
    assert status == 1 and events(tmp_path)[-1]["event"] == "given_up", output
    assert (tmp_path / "starts").read_text() == "3"


def test_a_new_checkpoint_starts_the_count_again(tmp_path, sleepers):
    plan = ("crash", "progress", "crash", "progress", "crash", "end")
    assert finish(supervise(tmp_path, *plan, restarts=1))[0] == 0


def test_a_mistake_is_not_tried_again(tmp_path, sleepers):
    status, _ = finish(supervise(tmp_path, "mistake"))
    assert status == 2 and (tmp_path / "starts").read_text() == "1"


def test_what_looks_like_a_mistake_after_training_is_tried_again(tmp_path, sleepers):
    """A storage that does not answer for a moment, the port of a process that is still dying."""
    status, output = finish(supervise(tmp_path, "late mistake", "mistake", "end"))
    assert status == 0 and (tmp_path / "starts").read_text() == "3", output


def test_a_run_that_stopped_itself_is_not_started_again(tmp_path, sleepers):
    """Whether or not it has trained before: every start would train a few broken steps more, and write them down."""
    status, output = finish(supervise(tmp_path, "progress", "stopped itself", "end"))
    assert status == 3 and (tmp_path / "starts").read_text() == "2", output
    assert "given_up" in output and "the run stopped itself" in output


def test_a_launcher_that_leaves_its_ranks_behind_has_not_succeeded(tmp_path, sleepers):
    status, output = finish(supervise(tmp_path, "work", restarts=0, launcher=LAUNCHER_THAT_LEAVES))
    assert status == 1 and "the launcher ended, but not 1 of its ranks" in output, output


def test_a_second_supervisor_is_refused_and_the_first_goes_on(tmp_path, sleepers):
    process = supervise(tmp_path, "work")
    wait_until(lambda: any(beat.phase == "training step" for beat in heartbeat.read_beats(tmp_path)))
    status, output = finish(supervise(tmp_path, "work"))
    assert status == 2 and "another supervisor keeps a run going there" in output
    heartbeat.request(tmp_path, "KILL", mark="of-another-supervisor")
    time.sleep(2.5)
    assert process.poll() is None and (tmp_path / "starts").read_text() == "1"
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0


def test_a_run_without_a_supervisor_is_left_alone_and_named(tmp_path, capsys):
    heartbeat.start(tmp_path, 0)
    with hold_run_folder(tmp_path):
        assert main(["--", "sleep", "1", f"--run_dir={tmp_path}"]) == 2
    heartbeat.stop()
    said = capsys.readouterr().err
    assert (
        f"a run is writing there (rank 0 is process {os.getpid()} on" in said
        and f"`kill {os.getpid()}`" in said
    )
    assert not (tmp_path / "supervise.jsonl").exists()


def test_a_run_whose_supervisor_was_killed_saves_and_stops(tmp_path):
    process = supervise(tmp_path, "work")
    try:
        wait_until(lambda: any(beat.phase == "training step" for beat in heartbeat.read_beats(tmp_path)))
        time.sleep(2.5)
        assert not (tmp_path / "saved").exists(), "as long as the supervisor lives"
        process.kill()
        wait_until((tmp_path / "saved").exists, seconds=20)
    finally:
        process.kill()
        heartbeat.request(tmp_path, "KILL")
        for sleeper in left_behind(tmp_path):
            sleeper.kill()
        process.communicate(timeout=60)


def test_a_disk_or_a_terminal_that_takes_nothing_does_not_end_the_supervisor(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def closed(*_):
        raise OSError(errno.EIO, "Input/output error")

    command = [sys.executable, "-c", f"import pathlib; open({str(tmp_path / 'starts')!r}, 'a').write('x')"]
    monkeypatch.setattr(heartbeat, "request", full)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=closed, flush=closed))
    (tmp_path / "supervise.jsonl").mkdir()  # no line can be written there
    assert Supervisor(command, tmp_path, 1, 0.1, 60, 60, 60).run() == 0
    failing = [*command[:2], command[2] + "; raise SystemExit(1)"]
    assert Supervisor(failing, tmp_path, 1, 0.1, 60, 60, 60).run() == 1
    assert (tmp_path / "starts").read_text() == "xxx"


def test_a_hang_is_noticed_shown_and_restarted(tmp_path, sleepers):
    status, output = finish(supervise(tmp_path, "hang", "end", hang_seconds=4))
    assert status == 0, output
    hang = next(event for event in events(tmp_path) if event["event"] == "hang")
    assert hang["ranks"][0]["phase"] == "training step" and hang["ranks"][0]["step"] == 7
    assert "in 'training step' at step 7" in output
    assert "Current thread" in output, "the stack of the hanging rank is printed"


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.1)


def test_signals_reach_the_rank_behind_a_launcher_that_hands_none_down(tmp_path, sleepers):
    process = supervise(tmp_path, "work")
    wait_until(lambda: any(beat.phase == "training step" for beat in heartbeat.read_beats(tmp_path)))
    process.send_signal(signal.SIGUSR1)
    wait_until((tmp_path / "usr1").exists)
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 0 and (tmp_path / "saved").exists(), output
    assert events(tmp_path)[-1] | {"time": ""} == {"event": "end", "time": "", "status": 0, "stopped": True}


def test_a_run_that_cannot_save_in_time_is_no_success(tmp_path, sleepers):
    process = supervise(tmp_path, "deaf", grace_seconds=2)
    wait_until(lambda: any(beat.phase == "training step" for beat in heartbeat.read_beats(tmp_path)))
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 1 and "no checkpoint within 2 s" in output, output
    assert [event["event"] for event in events(tmp_path)] == ["start", "too_late", "end"]


@pytest.mark.parametrize("before", [(), ("nohup",)])
def test_a_terminal_that_is_closed_leaves_a_checkpoint_and_no_process_or_under_nohup_the_run(
    tmp_path, sleepers, before
):
    process = supervise(tmp_path, "work", before=before)
    wait_until(lambda: any(beat.phase == "training step" for beat in heartbeat.read_beats(tmp_path)))
    process.send_signal(signal.SIGHUP)
    if before:
        time.sleep(2.5)
        assert process.poll() is None and not (tmp_path / "saved").exists()
        process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 0 and (tmp_path / "saved").exists(), output


def test_a_rank_on_another_host_ends_when_asked_and_ignores_what_was_asked_before_it_began(tmp_path):
    """A rank that no supervisor of this host started: it only shares the run folder."""
    heartbeat.request(tmp_path, "KILL")
    command = [sys.executable, "-c", RANK, f"--run_dir={tmp_path}", "work"]
    (tmp_path / "starts").write_text("0")
    rank = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
    try:
        wait_until(lambda: heartbeat.read_beats(tmp_path) != [])
        time.sleep(1.5)
        assert rank.poll() is None, "the request was older than the rank"
        heartbeat.request(tmp_path, "KILL")
        assert rank.wait(timeout=30) == heartbeat.EXIT_KILLED
    finally:
        os.killpg(rank.pid, signal.SIGKILL) if rank.poll() is None else None
        for process in left_behind(tmp_path):
            process.kill()


@pytest.mark.parametrize("command", [["train", "--config", "FILE"], ["train", "--config=FILE"]])
def test_the_run_folder_is_found_in_the_command(tmp_path, command):
    file = tmp_path / "run.yaml"
    file.write_text("run_dir: runs/x\nsteps: 3\n")
    words = [word.replace("FILE", str(file)) for word in command]
    assert str(run_folder(words)) == "runs/x"
    assert str(run_folder([*words, "--run_dir=runs/y"])) == "runs/y"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--run_dir=runs/y", "--steps=9", "--run_dir=runs/z"], "runs/z"),
        (["--run_dir='runs/with a space'"], "runs/with a space"),
        (["--run_dir=runs/x  # this time"], "runs/x"),
        (["--run_dir=~/runs/x"], str(Path.home() / "runs/x")),
    ],
)
def test_an_override_of_the_run_folder_means_what_it_means_to_the_trainer(tmp_path, overrides, expected):
    file = tmp_path / "run.yaml"
    file.write_text("run_dir: runs/first\n")

    class Trained(Section):
        run_dir: HomePath
        steps: int = 1

    found = run_folder(["train", "--config", str(file), *overrides])
    assert found == load_config(Trained, file, overrides).run_dir == Path(expected)


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        ("", ["sleep", "1"], "the command has no --config"),
        ("run_dir: null", ["sleep", "--config", "FILE"], "FILE: run_dir: expected a path, found None"),
        ("steps: 3", ["sleep", "--config=FILE"], "FILE: run_dir: expected a path, found None"),
        ("[run_dir]", ["sleep", "--config=FILE"], "FILE: expected sections (`key: value`), found a list"),
        ("run_dir: runs/x", ["sleep", "--config=FILE", "--run_dir="], "--run_dir=: run_dir: expected a path"),
        ("run_dir: runs/x", ["sleep", "--config=FILE", "--run_dir=[a"], "the value is not valid YAML"),
        (
            "run_dir: FILE.d",
            ["no_such_program", "--config=FILE"],
            "no_such_program: No such file or directory",
        ),
    ],
)
def test_a_command_that_cannot_be_supervised_is_refused_in_one_line(tmp_path, capfd, config, words, said):
    file = str(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text(config.replace("FILE", file))
    assert main(["--", *(word.replace("FILE", file) for word in words)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and said.replace("FILE", file) in line
