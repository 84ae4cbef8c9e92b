"""Keeps logging out of the training loop's way: numbers leave the device asynchronously, a thread does the rest.

The loop starts one copy of a small tensor a step and hands it on; whoever wants the numbers waits for the copy, and
that is the thread. Nothing the loop does next has to wait for a log line, a disk or a terminal.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

WAITING = 64
"""Steps that may wait to be logged; then the loop waits, so that memory stays bounded and nothing is dropped."""


class HostCopy:
    """A tensor as it was at this moment, on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._arrived: torch.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._arrived = torch.Event(tensor.device)
        self._arrived.record()

    def numbers(self) -> np.ndarray:
        """The values; waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._host.numpy()


class Worker:
    """Calls functions one after the other in a thread of its own.

    An error of one of them is raised by the next `do` or by `close`; what came after it is not called.
    """

    def __init__(self, name: str) -> None:
        self._tasks: queue.Queue[tuple[Callable[..., Any], tuple[Any, ...]] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have function(*arguments) called, after all that was asked for before."""
        self._raise()
        self._tasks.put((function, arguments))

    def wait(self) -> None:
        """Return when everything asked for so far is done."""
        self._tasks.join()
        self._raise()

    def close(self) -> None:
        """Finish what was asked for and end the thread; further calls do nothing."""
        if self._thread.is_alive():
            self._tasks.put(None)
            self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        failed = False
        while (task := self._tasks.get()) is not None:
            try:
                if not failed:
                    function, arguments = task
                    function(*arguments)
            except BaseException as error:  # raised again in the loop
                self._error, failed = error, True
            finally:
                self._tasks.task_done()
        self._tasks.task_done()
