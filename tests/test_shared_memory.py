"""Objects handed to another process in memory that both map."""

import resource
import socket

import numpy as np
import pytest

from sutrain.shared_memory import Receiver, Writer


@pytest.fixture
def ends():
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield Writer(one), Receiver(other)


def numbers(size: int, start: int = 0) -> dict:
    return {
        "some": np.arange(start, start + size),
        "flags": np.arange(size) % 3 == 0,
        "word": "x",
        "none": None,
    }


@pytest.mark.parametrize("size", [0, 1, 63, 1000, 400_000])
def test_what_is_sent_arrives_and_can_be_written_to(ends, size):
    writer, receiver = ends
    for start in (0, 7):
        writer.send(
            [numbers(size, start), numbers(3)[::-1] if size < 0 else np.arange(12).reshape(3, 4)[:, ::2]]
        )
        got, strided = receiver.receive()
        wanted = numbers(size, start)
        assert got.keys() == wanted.keys() and (got["word"], got["none"]) == ("x", None)
        assert all(got[key].dtype == wanted[key].dtype for key in ("some", "flags"))
        assert (got["some"] == wanted["some"]).all() and (got["flags"] == wanted["flags"]).all()
        assert strided.tolist() == [[0, 2], [4, 6], [8, 10]]
        got["some"] += 1
        assert got["some"].ctypes.data % 64 == 0 or not size


def test_memory_comes_back_when_its_last_array_is_gone(ends):
    writer, receiver = ends
    for start in (0, 100):
        writer.send(numbers(5000, start))
    first, second = receiver.receive(), receiver.receive()
    part = first["some"][10:20]
    del first
    assert not receiver.done_with, "a part of it is still in use"
    del part
    assert list(receiver.done_with) == [0]
    writer.give_back(receiver.done_with.popleft())
    writer.send(numbers(9, 500))
    assert receiver.receive()["some"][0] == 500 and second["some"][0] == 100
    assert len(writer._segments) == 2
    writer.give_back(0)
    writer.send(numbers(1_000_000, 3))  # more than there is room for
    assert receiver.receive()["some"][-1] == 1_000_002 and len(writer._segments) == 2


def test_an_end_that_is_gone_is_told(ends):
    writer, receiver = ends
    writer._connection.close()
    with pytest.raises(EOFError):
        receiver.receive()
    receiver._connection.close()


def test_a_process_that_may_open_no_further_file_is_told_so(ends):
    writer, receiver = ends
    writer.send(numbers(1000))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            receiver.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
