"""Signs of life from every rank, outside of the collectives that a stuck rank would hold up.

Each rank sends a datagram when it starts and ends a stage of a step; rank 0 keeps the last one of each. Sending never
waits, a lost datagram costs nothing, and when the run hangs the rank with the least progress is the one that the
others wait for. Datagrams without the run's random token are thrown away.

Stages of a step, in order: 0 waiting for data, 1 the batch is there: forward passes, and the backward passes between
them, 2 the last backward pass, reduction and update, 3 between steps (evaluation, checkpoint). What is told as a rank's
forward time is the forward passes alone: in them no rank waits for another (except under ZeRO-3), while ahead of the
first all wait for the rank that waits for data, and ZeRO-2 reduces gradients in each backward pass.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

STAGES = ("data", "forward", "update", "between")
_MESSAGE = struct.Struct("!16sIqBdddd")  # token, rank, step, stage, time, step seconds, data wait, forward


@dataclass(frozen=True)
class RankState:
    """The last sign of life of one rank; seconds are of its last finished step."""

    step: int
    stage: int
    time: float
    step_seconds: float
    data_wait_seconds: float
    forward_seconds: float

    @property
    def progress(self) -> float:
        """Steps done, with the stages of the current one as quarters."""
        return self.step + self.stage / len(STAGES)


class RankBoard:
    """Rank 0's side: the last state of every rank, kept by a thread."""

    def __init__(self, host: str, world_size: int) -> None:
        self.states: dict[int, RankState] = {}
        self.token = secrets.token_bytes(16)
        self._world_size = world_size
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self._socket.settimeout(0.5)
        self.port: int = self._socket.getsockname()[1]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="rank-board", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                data = self._socket.recv(_MESSAGE.size + 1)
            except TimeoutError:
                continue
            except OSError:
                return
            if len(data) != _MESSAGE.size:
                continue
            token, rank, step, stage, *numbers = _MESSAGE.unpack(data)
            if secrets.compare_digest(token, self.token) and rank < self._world_size and stage < len(STAGES):
                self.take(rank, RankState(step, stage, *numbers))

    def take(self, rank: int, state: RankState) -> None:
        """Keep a state unless a later one is known (datagrams may overtake each other)."""
        known = self.states.get(rank)
        if known is None or state.time >= known.time:
            self.states = {**self.states, rank: state}

    def close(self) -> None:
        """Stop listening; further calls do nothing."""
        self._closed.set()
        self._socket.close()
        self._thread.join()


class RankClock:
    """Every rank's side: a method for each of the four moments of a step, `passing` around every forward pass, `alive`
    where a stage takes long. Made on all ranks at once: the constructor is collective. Off (no socket, no message)
    unless `enabled`.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, enabled: bool = True) -> None:
        self.rank, self._device = rank, device
        self.board: RankBoard | None = None
        self._socket: socket.socket | None = None
        self._enabled, self._waited, self._seconds, self._forward = enabled, 0.0, 0.0, 0.0
        self._step, self._stage, self._mark = 0, 0, 0.0
        self._passes: list[tuple[Any, Any]] = []
        if not enabled:
            return
        host = _shared_host(world_size)
        self.board = RankBoard(host or "127.0.0.1", world_size) if rank == 0 else None
        words = [0, 0, 0, 0, 0]
        if self.board is not None and host:
            words = [self.board.port, *struct.unpack("!4I", self.board.token)]
        shared = torch.tensor(words, dtype=torch.int64, device=device)
        if world_size > 1:
            dist.broadcast(shared, 0)
        port, *token = shared.tolist()
        if port and rank:
            self._token, self._address = struct.pack("!4I", *token), (host, port)
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def waiting(self, step: int) -> None:
        """`step` updates are done, the next batch is waited for."""
        self._step = step
        self._send(0)

    def forward(self, waited_seconds: float) -> None:
        """The batch is there after a wait, the forward passes come next."""
        self._waited, self._mark = waited_seconds, time.perf_counter()
        if self._device.type != "cpu":
            self._forward = self._elapsed()  # of the step before, which has ended on the device too
        self._passes = []
        self._send(1)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Around a micro-batch's forward pass."""
        if not self._enabled:
            yield
            return
        begun = self._now()
        yield
        self._passes.append((begun, self._now()))

    def update(self) -> None:
        """The forward passes are done, gradients are reduced next."""
        if self._device.type == "cpu":
            self._forward = self._elapsed()
        self._send(2)

    def finished(self, step: int) -> None:
        """The update that makes `step` is done."""
        self._step, self._seconds = step, self._waited + time.perf_counter() - self._mark
        self._send(3)

    def alive(self) -> None:
        """Still in the same stage, and at work."""
        self._send(self._stage)

    def _now(self) -> Any:
        """This moment; on a device the event of having done all that it was given so far."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def _elapsed(self) -> float:
        """Seconds of all passes; the last known ones while the device has not come to the end of them."""
        if self._device.type == "cpu":
            return sum(ended - begun for begun, ended in self._passes)
        if not all(ended.query() for _, ended in self._passes):
            return self._forward
        return sum(begun.elapsed_time(ended) for begun, ended in self._passes) / 1000

    def _send(self, stage: int) -> None:
        self._stage = stage
        step = self._step if stage != 3 else self._step - 1
        numbers = (time.time(), self._seconds, self._waited, self._forward)
        if self.board is not None:
            self.board.take(self.rank, RankState(step, stage, *numbers))
        if self._socket is None:
            return
        message = _MESSAGE.pack(self._token, self.rank, step, stage, *numbers)
        with contextlib.suppress(OSError):  # a full buffer or a network that is away must not stop training
            self._socket.sendto(message, self._address)

    def close(self) -> None:
        """Let go of the sockets; further calls do nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self.board is not None:
            self.board.close()


def _shared_host(world_size: int) -> str | None:
    """The address on which rank 0 can hear all ranks: this host alone while all are on it, else MASTER_ADDR.

    None where MASTER_ADDR is this host's own name for itself, which others cannot reach: then only rank 0 is shown.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if local >= world_size:
        return "127.0.0.1"
    try:
        address = socket.gethostbyname(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    except OSError:
        return None
    return None if ipaddress.ip_address(address).is_loopback else address
