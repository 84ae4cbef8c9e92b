"""What is logged is in order, complete, and what was there at that moment; errors do not get lost."""

import threading
import time

import pytest
import torch

from sutrain.monitor.window import SLOT_SECONDS, WINDOW_SECONDS, RollingMaximum
from sutrain.monitor.worker import WAITING, HostCopy, Worker


def test_a_copy_keeps_the_numbers_of_its_moment():
    tensor = torch.arange(4.0)
    copy = HostCopy(tensor)
    tensor.fill_(-1)
    assert copy.numbers().tolist() == [0, 1, 2, 3]


def test_the_caller_does_not_wait_and_the_order_stays():
    seen, gate = [], threading.Event()
    worker = Worker("test")
    worker.do(gate.wait)
    began = time.perf_counter()
    for number in range(WAITING - 1):
        worker.do(seen.append, number)
    assert time.perf_counter() - began < 1 and seen == []
    gate.set()
    worker.wait()
    assert seen == list(range(WAITING - 1))
    worker.do(seen.append, "last")
    worker.close()
    worker.close()
    assert seen[-1] == "last"


def test_an_error_is_raised_by_the_next_call_and_nothing_is_done_after_it():
    def fail():
        raise OSError(28, "No space left on device")

    seen: list[int] = []
    worker = Worker("test")
    worker.do(fail)
    worker.do(seen.append, 1)
    with pytest.raises(OSError, match="No space left"):
        worker.wait()
    assert seen == []
    worker.close()
    worker = Worker("test")
    worker.do(fail)
    with pytest.raises(OSError, match="No space left"):
        worker.close()


def test_the_maximum_of_the_last_minute_holds_for_two_scrapes_and_then_goes():
    rolling = RollingMaximum()
    assert rolling.add([1.0, float("nan")], now=0.0)[0] == 1.0
    assert rolling.add([9.0, 2.0], now=1.0).tolist() == [9.0, 2.0]
    for second in range(2, int(WINDOW_SECONDS) + 1):
        assert rolling.add([1.0, 1.0], now=second).tolist() == [9.0, 2.0]
    assert rolling.add([1.0, 1.0], now=WINDOW_SECONDS + SLOT_SECONDS).tolist() == [1.0, 1.0]
    assert len(rolling._slots) <= WINDOW_SECONDS / SLOT_SECONDS + 1
