"""Every rank is heard outside of the collectives, and nobody else is."""

import socket
import time

import torch

from sutrain.monitor import ranks
from sutrain.monitor.exporter import MAX_RANKS, _conspicuous
from sutrain.monitor.ranks import _MESSAGE, RankBoard, RankClock, RankState


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def clock_of(board: RankBoard, rank: int) -> RankClock:
    """A clock of another rank of the same run, as the broadcast would have made it."""
    clock = RankClock(rank, 2, torch.device("cpu"), enabled=False)
    clock._token, clock._address = board.token, ("127.0.0.1", board.port)
    clock._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    return clock


def passed(clock: RankClock) -> None:
    """Two forward passes of 20 ms, and as much before, between and after them."""
    for _ in range(2):
        time.sleep(0.02)
        with clock.passing():
            time.sleep(0.02)
    time.sleep(0.02)
    clock.update()


def test_stages_are_heard_and_progress_grows():
    board = RankBoard("127.0.0.1", 2)
    clock = clock_of(board, 1)
    clock._enabled = True
    seen = []
    for stage in (
        lambda: clock.waiting(7), lambda: clock.forward(0.25), lambda: passed(clock), lambda: clock.finished(8),
        lambda: clock.waiting(8),
    ):  # fmt: skip
        stage()
        wait_for(lambda: 1 in board.states and board.states[1].progress not in seen)
        seen.append(board.states[1].progress)
    assert seen == [7.0, 7.25, 7.5, 7.75, 8.0]
    state = board.states[1]
    assert state.data_wait_seconds == 0.25 and state.step_seconds > 0.35
    assert 0.04 <= state.forward_seconds < state.step_seconds - 0.25 - 0.06 + 0.001  # the passes alone
    assert abs(state.time - time.time()) < 5
    clock.close()
    board.close()


def test_rank_0_alone_is_heard_too_and_a_clock_that_is_off_says_nothing():
    clock = RankClock(0, 1, torch.device("cpu"))
    clock.waiting(3)
    assert clock.board.states[0].step == 3
    clock.close()
    clock.close()
    clock = RankClock(0, 1, torch.device("cpu"))
    clock.finished(4)
    before = clock.board.states[0]
    time.sleep(0.01)
    clock.alive()  # within a long evaluation
    assert clock.board.states[0].progress == before.progress and clock.board.states[0].time > before.time
    clock.close()
    off = RankClock(0, 1, torch.device("cpu"), enabled=False)
    for stage in (lambda: off.waiting(1), lambda: off.forward(0.0), off.update, lambda: off.finished(1)):
        stage()
    assert off.board is None
    off.close()


def test_strangers_and_nonsense_are_thrown_away():
    board = RankBoard("127.0.0.1", 2)
    good = (1, 5, 1, 1.0, 1.0, 1.0, 1.0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for message in (
            b"", b"x" * 5000, _MESSAGE.pack(b"0" * 16, *good), _MESSAGE.pack(board.token, 2, *good[1:]),
            _MESSAGE.pack(board.token, 1, 5, 9, *good[3:]), _MESSAGE.pack(board.token, *good)[:-1],
        ):  # fmt: skip
            stranger.sendto(message, ("127.0.0.1", board.port))
        stranger.sendto(_MESSAGE.pack(board.token, *good), ("127.0.0.1", board.port))
    wait_for(lambda: board.states)
    assert board.states == {1: RankState(5, 1, 1.0, 1.0, 1.0, 1.0)}
    board.take(1, RankState(4, 0, 0.5, 0, 0, 0))  # overtaken
    assert board.states[1].step == 5
    board.close()


def test_hosts_that_cannot_hear_each_other_are_not_tried(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks._shared_host(2) == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert ranks._shared_host(4) is None
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.7")
    assert ranks._shared_host(4) == "192.0.2.7"


def test_of_many_ranks_the_slow_and_the_late_are_shown():
    states = {rank: RankState(100, 0, 1.0, 1.0, 0.0, 0.1) for rank in range(500)}
    states[77] = RankState(99, 1, 1.0, 1.0, 0.0, 0.1)
    states[413] = RankState(100, 0, 1.0, 1.0, 0.0, 0.9)
    shown = _conspicuous(states)
    assert {0, 77, 413} <= shown and len(shown) <= MAX_RANKS
