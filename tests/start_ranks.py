"""Start the ranks of a program on this host, as the deepspeed launcher does but 4 s sooner (it imports torch twice).

python tests/start_ranks.py RANKS PORT PROGRAM [ARGUMENT …]. When a rank fails the others are ended and its exit status
becomes this program's; SIGTERM and SIGINT are handed on. It is for runs on a device; those on the CPU start sooner
still (tests/warm.py).
"""

import os
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 10.0


def main() -> int:
    ranks, port, *program = sys.argv[1:]
    processes = [
        subprocess.Popen(
            [sys.executable, "-u", *program],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
            | {"CROSS_RANK": "0", "CROSS_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(int(ranks))
    ]

    def end(number: int) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: end(number))
    failed = 0
    while not failed and any(process.poll() is None for process in processes):
        failed = next((process.returncode for process in processes if process.returncode), 0)
        time.sleep(0.05)
    failed = failed or next((process.returncode for process in processes if process.returncode), 0)
    end(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    return failed if failed >= 0 else 128 - failed


if __name__ == "__main__":
    sys.exit(main())
