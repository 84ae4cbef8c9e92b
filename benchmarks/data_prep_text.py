"""Gigabytes of text for benchmarks/data_prep.py, made of real text: documentation (English) and poems or statutes
(Chinese), cut into lines of a given length. Once the real text is used up it is perturbed and repeated: every
repetition rotates the words of a line and gets a number, so that no line is an exact copy of another.

`--english` and `--chinese` name files or folders of .txt, .html, .jsonl or .jsonl.zst. Without them: HTML of the
packages rust-doc, ghc-doc, openjdk-17-doc and python3-doc below /usr/share/doc, and the statutes of
`python -m data_prep.fetch china-law`.
"""

from __future__ import annotations

import html
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import zstandard

_DOCUMENTATION = ("rust-doc", "ghc-doc", "openjdk-17-jre-headless", "openjdk-17-doc", "python3.11")
_MARKUP = re.compile(r"<(script|style)[^>]*>.*?</\1>|<[^>]+>", re.DOTALL | re.IGNORECASE)
_REAL_BYTES = 150_000_000  # of real text, before it is repeated


def make_file(
    path: Path, language: str, line_bytes: int, size_bytes: int, source: Path | None, cache: Path
) -> None:
    """Write about `size_bytes` of lines of about `line_bytes` to `path`, unless a file of that size is there."""
    if path.exists() and path.stat().st_size >= size_bytes:
        return
    words = _words(language, source, cache, min(size_bytes, _REAL_BYTES))
    with path.open("wb") as file:
        written = repetition = 0
        while written < size_bytes:
            for line in _lines(words, line_bytes, repetition):
                written += file.write(line)
                if written >= size_bytes:
                    break
            repetition += 1


def _lines(words: list[bytes], line_bytes: int, repetition: int) -> Iterator[bytes]:
    line: list[bytes] = []
    length = 0
    for word in words:
        line.append(word)
        length += len(word) + 1
        if length >= line_bytes - 4:
            if repetition:
                turn = repetition * 7 % len(line)
                line = [*line[turn:], *line[:turn], str(repetition).encode()]
            yield b" ".join(line) + b"\n"
            line, length = [], 0


def _words(language: str, source: Path | None, cache: Path, wanted_bytes: int) -> list[bytes]:
    found: list[bytes] = []
    size = 0
    for text in _texts(language, source, cache):
        data = text.encode()
        found += data.split()
        size += len(data)
        if size >= wanted_bytes:
            break
    if size < 1_000_000:
        sys.exit(f"only {size} bytes of {language} text found; name some with --{language}=PATH")
    return found


def _texts(language: str, source: Path | None, cache: Path) -> Iterator[str]:
    if source is not None:
        folders = [source]
    elif language == "english":
        folders = [Path("/usr/share/doc") / name for name in _DOCUMENTATION]
    else:
        folders = [cache / "law"]
        if not any(folders[0].glob("*.jsonl")):
            command = [sys.executable, "-m", "data_prep.fetch", "china-law", "--output", str(folders[0])]
            subprocess.run(command, check=True)
    for folder in folders:
        paths = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*.*") if p.is_file())
        for path in paths:
            yield from _texts_of(path)


def _texts_of(path: Path) -> Iterator[str]:
    if path.name.endswith((".jsonl", ".jsonl.zst")):
        with path.open("rb") as file:
            stream = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
            for line in io.TextIOWrapper(stream, "utf-8"):
                text = json.loads(line)["text"]
                yield text if isinstance(text, str) else "".join(text)
    elif path.suffix in (".html", ".txt"):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield html.unescape(_MARKUP.sub("", text)) if path.suffix == ".html" else text
