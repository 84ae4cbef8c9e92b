"""Cleaning functions as a user would write them."""

from __future__ import annotations

import os
import time

NUMBER = 7


def no_laws(text: str) -> str | None:
    return None if "law" in text else text


def first_line(text: str) -> str | None:
    return text.split("\n")[0]


def broken(text: str) -> str | None:
    raise ValueError(text)


def length(text: str) -> int:
    return len(text)


def grow_the_file(text: str) -> str | None:
    """Makes the file that the environment names longer when its first text comes by, as another program might."""
    name = os.environ["GROWING_FILE"]
    if text == "the first" and os.path.getsize(name) < 10_000:
        with open(name, "a") as file:
            file.write("one more\n" * 2000)
    return text


def slowly(text: str) -> str | None:
    """Takes its time, so that a kill at a random time finds a task at work."""
    time.sleep(0.002)
    return text
