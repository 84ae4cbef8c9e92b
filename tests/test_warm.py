"""Ranks that are forked with everything imported end, fail and are ended as processes of their own are."""

import psutil
import pytest

from tests import warm
from tests.test_supervise import wait_until

RANK = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("asked to end", flush=True), os._exit(0)))
print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), sys.argv[1:], flush=True)
if os.environ.get("RANK") == "1":
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.05)
    raise KeyError("what rank 1 meets")
if "stay" in sys.argv:
    print(os.getpid(), flush=True)
    open(sys.argv[2], "w").close()
    time.sleep(600)
sys.exit(5)
"""


def test_a_program_alone_ends_as_python_ends_it():
    done = warm.run("-c", RANK, "a word")
    assert (done.returncode, done.stdout) == (5, "rank None of None ['a word']\n")


def test_a_rank_that_fails_ends_the_others_and_gives_its_status(tmp_path):
    done = warm.run("-c", RANK, "stay", tmp_path / "stays", ranks=2)
    assert done.returncode == 1 and "KeyError: 'what rank 1 meets'" in done.stdout
    assert "rank 0 of 2 ['stay', " in done.stdout and "asked to end" in done.stdout


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_ranks_end_with_what_started_them(how, tmp_path):
    with warm.start("-c", RANK, "stay", tmp_path / "stays") as process:
        process.stdout.readline()
        pid = int(process.stdout.readline())
        getattr(process, how)()
        wait_until(lambda: not psutil.pid_exists(pid))
    assert process.returncode == {"terminate": 0, "kill": -9}[how]
