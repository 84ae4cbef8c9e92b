"""Objects with large arrays, handed from one process to another in memory that both map.

    Writer(connection).send(thing)          Receiver(connection).receive() -> thing

The arrays of what is received are that memory. It goes back to the writer when the last of them is gone, and is used
again: new memory would cost more than reading and decoding what goes into it (a page fault for every 4 KiB).
`connection` is one end of a pair of Unix sockets of type SOCK_SEQPACKET; both processes are ours, so pickle is safe.
"""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import socket
import struct
from collections import deque
from typing import Any

import numpy as np

_ALIGNMENT = 64
_GRAIN = 1 << 20
_MESSAGE = struct.Struct("<QQQ")  # number of the segment, where the description lies in it


class Writer:
    """The side that hands over. `give_back` tells it which segments the other side has done with."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._segments: list[mmap.mmap] = []
        self._free: list[int] = []

    def give_back(self, segment: int) -> None:
        self._free.append(segment)

    def send(self, thing: Any) -> None:
        """Raises ConnectionError when the other side is gone."""
        buffers: list[pickle.PickleBuffer] = []
        described = pickle.dumps(thing, protocol=5, buffer_callback=buffers.append)
        contents = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
        description = pickle.dumps((described, [len(content) for content in contents]))
        start = sum(_aligned(len(content)) for content in contents)
        segment, descriptor = self._room(start + len(description))
        target, at = np.frombuffer(self._segments[segment], np.uint8), 0
        for content in contents:
            target[at : at + len(content)] = content
            at += _aligned(len(content))
        self._segments[segment][start : start + len(description)] = description
        message = _MESSAGE.pack(segment, start, len(description))
        try:
            socket.send_fds(self._connection, [message], [] if descriptor is None else [descriptor])
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _room(self, size: int) -> tuple[int, int | None]:
        """A segment of that size that nobody uses, and its descriptor if the other side has not seen it."""
        segment = self._free.pop() if self._free else len(self._segments)
        if segment < len(self._segments) and len(self._segments[segment]) >= size:
            return segment, None
        size += -size % _GRAIN
        descriptor = os.memfd_create("read-ahead")
        os.ftruncate(descriptor, size)
        self._segments[segment : segment + 1] = [mmap.mmap(descriptor, size)]
        return segment, descriptor


class Receiver:
    """The side that takes."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._segments: dict[int, np.ndarray] = {}
        self.done_with: deque[int] = deque()
        """Segments whose arrays are gone; whoever talks to the writer takes them out and tells it."""

    def receive(self) -> Any:
        """What was sent. Raises EOFError or ConnectionError when the other side is gone, another OSError where this
        process may open no further file or has no room to map it."""
        message, descriptors, flags, _ = socket.recv_fds(self._connection, _MESSAGE.size, 1)
        if not message:
            raise EOFError
        if flags & socket.MSG_CTRUNC:  # the descriptor is lost
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        segment, start, length = _MESSAGE.unpack(message)
        for descriptor in descriptors:
            self._segments[segment] = np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)
            os.close(descriptor)
        lent = self._segments[segment].view(_Lent)
        lent.segment, lent.done_with = segment, self.done_with
        shared = lent.data
        described, sizes = pickle.loads(shared[start : start + length])
        buffers, at = [], 0
        for size in sizes:
            buffers.append(shared[at : at + size])
            at += _aligned(size)
        return pickle.loads(described, buffers=buffers)


class _Lent(np.ndarray):
    """A segment as long as something refers to it."""

    segment: int
    done_with: deque[int]

    def __del__(self) -> None:
        if hasattr(self, "segment"):  # a view of it by numpy has none
            self.done_with.append(self.segment)


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT
