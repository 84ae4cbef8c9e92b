"""A fault that is put into a run from outside (see faulty.py): which one, and how it happens."""

import json
import os
import random
import signal
import time
from pathlib import Path

PHASES = ("training step", "evaluation", "resuming", "waiting for data", "loader", "file", "publish", "prune")


class Fault:
    """kind: kill, stop, error, or ask (SIGTERM); nth: how often the phase must come until it happens."""

    def __init__(self, run_dir: Path, phase: str, nth: int, rank: int, kind: str):
        self.run_dir, self.phase, self.nth, self.rank, self.kind = run_dir, phase, nth, rank, kind
        self.calls = 0

    def due(self) -> bool:
        self.calls += 1
        return self.calls == self.nth

    def happen(self, victim: int = 0) -> None:
        """To process `victim`, by default this one. What happens is a line of RUN/faults.jsonl before it does."""
        rank = int(os.environ.get("RANK", 0))
        line = json.dumps({"phase": self.phase, "kind": self.kind, "rank": rank, "time": time.time()})
        with (self.run_dir / "faults.jsonl").open("a") as file:
            file.write(line + "\n")
        if self.kind == "error":
            raise RuntimeError(f"fault in {self.phase}")
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "ask": signal.SIGTERM}
        os.kill(victim or os.getpid(), signals[self.kind])
        if self.kind == "stop":
            time.sleep(1)  # it takes the other threads with it only when the signal has arrived


def drawn(run_dir: Path) -> Fault | None:
    """What this start meets."""
    if os.environ.get("FAULT"):
        phase, nth, rank, kind = os.environ["FAULT"].rsplit(" ", 3)
        return Fault(run_dir, phase, int(nth), int(rank), kind)
    log = (run_dir / "supervise.jsonl").read_text().splitlines()
    start = sum(json.loads(line)["event"] == "start" for line in log)
    met = run_dir / "faults.jsonl"
    if met.exists() and len(met.read_text().splitlines()) >= int(os.environ["FAULTS"]):
        return None
    draw = random.Random(f"{os.environ['FAULTS_SEED']} {start}")
    phase = draw.choice(PHASES)
    rank = 0 if phase in ("publish", "prune") else draw.randrange(2)
    kind = draw.choices(("kill", "stop", "error"), (8, 1, 1))[0]
    return Fault(run_dir, phase, 1 if phase == "resuming" else draw.randint(1, 6), rank, kind)


def serve(descriptor: int, run_dir: str, phase: str, nth: int, kind: str) -> None:
    """A process that reads ahead and meets a fault while it reads. Killed is the rank, which would do without this
    process, and without one that fails: faulty.py lets the rank fail with it. One that is stopped it waits for."""
    from sutrain import data, reader

    fault, read = Fault(Path(run_dir), phase, nth, 0, kind), data.Samples.read
    first = Path(run_dir) / f".fault-{os.getppid()}"  # one of the rank's processes meets it

    def faulty(*arguments):
        if fault.due():
            try:
                first.touch(exist_ok=False)
            except FileExistsError:
                return read(*arguments)
            fault.happen(os.getppid() if kind == "kill" else 0)
        return read(*arguments)

    data.Samples.read = faulty
    reader.serve(descriptor)
