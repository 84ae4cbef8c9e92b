"""pretrain.py with faults put in from outside: deepspeed tests/faulty.py --config X …, told by environment variables.

FAULTS_SEED and FAULTS say that the starts of a supervised run each meet one fault, until FAULTS were met; it is drawn
from the seed and the number of the start, which all ranks read from supervise.jsonl. FAULT="PHASE NTH RANK KIND" asks
for one certain fault. What was done is a line of RUN/faults.jsonl, written before it is done.
"""

import functools
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from sutrain import checkpoint_writer, data, heartbeat, prefetch, pretrain  # noqa: E402
from tests.fault import Fault, drawn  # noqa: E402

RUN_DIR = Path(next(word for word in sys.argv if word.startswith("--run_dir=")).partition("=")[2])


def main() -> None:
    fault = drawn(RUN_DIR)
    if fault is not None and fault.rank == int(os.environ.get("RANK", 0)):
        put_in(fault)
    pretrain.main()


def put_in(fault: Fault) -> None:
    def before(function):
        @functools.wraps(function)
        def wrapped(*arguments, **settings):
            if fault.due():
                if fault.phase == "file":  # half a file is on disk
                    arguments[0].write_bytes(b"half")
                fault.happen()
            return function(*arguments, **settings)

        return wrapped

    if fault.phase == "loader":
        prefetch._UP_SECONDS = 60  # so that it is a process that reads
        there = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.fault import serve; "
        prefetch.PROGRAM = (
            there + f"serve({{descriptor}}, {str(RUN_DIR)!r}, {fault.phase!r}, {fault.nth}, {fault.kind!r})"
        )
        if fault.kind == "error":  # what a process cannot read the loop tries itself
            data.Samples.read = failing_as_well(data.Samples.read)
    elif fault.phase == "file":
        checkpoint_writer.write_tensors = before(checkpoint_writer.write_tensors)
    elif fault.phase == "publish":  # before and behind the rename, as it comes
        checkpoint_writer._sync_directory = before(checkpoint_writer._sync_directory)
    elif fault.phase == "prune":  # with the name gone and the files there
        # In that module alone: torch removes folders too, and swallows what goes wrong there.
        checkpoint_writer.shutil = SimpleNamespace(rmtree=before(shutil.rmtree))
    else:
        beat = heartbeat.beat

        def watched(said: str, step: int) -> None:
            beat(said, step)
            if said == fault.phase and fault.due():
                fault.happen()

        heartbeat.beat = watched
        sys.modules["sutrain.evaluation"].beat = watched


def failing_as_well(read):
    def wrapped(*arguments):
        if (RUN_DIR / f".fault-{os.getpid()}").exists():
            raise RuntimeError("fault in loader")
        return read(*arguments)

    return wrapped


if __name__ == "__main__":
    main()
