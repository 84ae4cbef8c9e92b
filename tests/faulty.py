"""pretrain.py with faults put in from outside: deepspeed tests/faulty.py --config X …, told by environment variables.

FAULTS_SEED and FAULTS say that the starts of a supervised run each meet one fault, until FAULTS were met; it is drawn
from the seed and the number of the start, which all ranks read from supervise.jsonl. FAULT="PHASE NTH RANK KIND" asks
for one certain fault. What was done is a line of RUN/faults.jsonl, written before it is done.
"""

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parents[1])

from sutrain import checkpoint_writer, data, heartbeat, pretrain  # noqa: E402

RANK = int(os.environ.get("RANK", 0))
PHASES = ("training step", "evaluation", "resuming", "waiting for data", "loader", "file", "publish", "prune")
RUN_DIR = Path(next(word for word in sys.argv if word.startswith("--run_dir=")).partition("=")[2])


def drawn() -> tuple[str, int, int, str] | None:
    """(phase, how-manieth time, rank, kill | stop | error | ask) of this start; to ask is to send SIGTERM."""
    if os.environ.get("FAULT"):
        phase, nth, rank, kind = os.environ["FAULT"].rsplit(" ", 3)
        return phase, int(nth), int(rank), kind
    log = (RUN_DIR / "supervise.jsonl").read_text().splitlines()
    start = sum(json.loads(line)["event"] == "start" for line in log)
    met = RUN_DIR / "faults.jsonl"
    if met.exists() and len(met.read_text().splitlines()) >= int(os.environ["FAULTS"]):
        return None
    draw = random.Random(f"{os.environ['FAULTS_SEED']} {start}")
    phase = draw.choice(PHASES)
    rank = 0 if phase in ("publish", "prune") else draw.randrange(2)
    kind = draw.choices(("kill", "stop", "error"), (8, 1, 1))[0]
    return phase, 1 if phase == "resuming" else draw.randint(1, 6), rank, kind


def fault(phase: str, kind: str) -> None:
    line = json.dumps({"phase": phase, "kind": kind, "rank": RANK, "time": time.time()})
    with (RUN_DIR / "faults.jsonl").open("a") as file:
        file.write(line + "\n")
    if kind == "error":
        raise RuntimeError(f"fault in {phase}")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "ask": signal.SIGTERM}[kind])
    if kind == "stop":
        time.sleep(1)  # it takes the other threads with it only when the signal has arrived


def main() -> None:
    plan = drawn()
    if plan is not None and plan[2] == RANK:
        phase, nth, _, kind = plan
        calls = {"n": 0}

        def due() -> bool:
            calls["n"] += 1
            return calls["n"] == nth

        def before(function):
            @functools.wraps(function)
            def wrapped(*arguments, **settings):
                if due():
                    if phase == "file":  # half a file is on disk
                        arguments[0].write_bytes(b"half")
                    fault(phase, kind)
                return function(*arguments, **settings)

            return wrapped

        if phase == "loader":
            data.Samples.read = before(data.Samples.read)
        elif phase == "file":
            checkpoint_writer.write_tensors = before(checkpoint_writer.write_tensors)
        elif phase == "publish":  # before and behind the rename, as it comes
            checkpoint_writer._sync_directory = before(checkpoint_writer._sync_directory)
        elif phase == "prune":  # with the name gone and the files there
            # In that module alone: torch removes folders too, and swallows what goes wrong there.
            checkpoint_writer.shutil = SimpleNamespace(rmtree=before(shutil.rmtree))
        else:
            beat = heartbeat.beat

            def watched(said: str, step: int) -> None:
                beat(said, step)
                if said == phase and due():
                    fault(phase, kind)

            heartbeat.beat = watched
            sys.modules["sutrain.evaluation"].beat = watched
    pretrain.main()


if __name__ == "__main__":
    main()
