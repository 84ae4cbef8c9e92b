"""Cleaning functions as a user would write them."""

from __future__ import annotations

NUMBER = 7


def no_laws(text: str) -> str | None:
    return None if "law" in text else text


def first_line(text: str) -> str | None:
    return text.split("\n")[0]


def broken(text: str) -> str | None:
    raise ValueError(text)


def length(text: str) -> int:
    return len(text)
