"""Finding the input: links, capitals, stores of blobs, odd names; what cannot be read is said, not left out."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from data_prep import inputs
from data_prep.config import CorpusSection
from data_prep.inputs import list_corpus
from data_prep.sources import read_batches
from tests.data_prep.made import command_line, make_texts, settings, write_jsonl


def listed(*paths: Path | str, **section) -> tuple[list[str], list[str], list[str]]:
    """Relative names of the files taken, names of those ignored, and problems."""
    corpus = CorpusSection(name="made", paths=[str(path) for path in paths], **section)
    files, ignored, problems = list_corpus(0, corpus)
    return [file.relative for file in files], [Path(path).name for path in ignored], problems


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root reads everything; give that up for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_paragraphs_are_those_of_txt_beside_files_of_other_formats(tmp_path):
    (tmp_path / "books.txt").write_text("one\nline\n\ntwo\n")
    write_jsonl(tmp_path / "web.jsonl", make_texts(30))
    files, _, _ = list_corpus(0, CorpusSection(name="x", paths=[str(tmp_path)], records="paragraph"))
    found = [sum(len(batch.lines) for batch in read_batches(file, 0, None, 10_000)) for file in files]
    assert [file.relative for file in files] == ["books.txt", "web.jsonl"] and found == [2, 30]


def test_linked_folders_are_followed_once(tmp_path):
    write_jsonl(tmp_path / "store" / "b.jsonl", make_texts(3))
    write_jsonl(tmp_path / "raw" / "a.jsonl", make_texts(3))
    (tmp_path / "raw" / "part").symlink_to(tmp_path / "store")
    (tmp_path / "raw" / "again").symlink_to(tmp_path / "raw")
    (tmp_path / "store" / "up").symlink_to(tmp_path / "raw")
    assert listed(tmp_path / "raw") == (["a.jsonl", "part/b.jsonl"], [], [])
    assert listed(tmp_path / "raw" / "**" / "*.jsonl") == (["a.jsonl", "part/b.jsonl"], [], [])


def test_capital_suffixes_are_taken(tmp_path):
    write_jsonl(tmp_path / "A.JSONL", make_texts(3))
    (tmp_path / "B.Txt.GZ").write_bytes(gzip.compress(b"text\n"))
    assert listed(tmp_path) == (["A.JSONL", "B.Txt.GZ"], [], [])
    files, _, _ = list_corpus(0, CorpusSection(name="x", paths=[str(tmp_path)]))
    assert [(file.format, file.compression) for file in files] == [("jsonl", ""), ("txt", ".gz")]


@pytest.mark.parametrize("pattern", ["", "*.jsonl", "**/*.jsonl"])
def test_a_link_to_nowhere_is_an_error(tmp_path, pattern):
    write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    _, _, problems = listed(tmp_path / pattern)
    assert len(problems) == 1 and "b.jsonl: a link to" in problems[0] and "does not exist" in problems[0]


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl", "*/*.jsonl"])
def test_a_folder_that_cannot_be_read_is_an_error(pattern):
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        write_jsonl(folder / "open" / "a.jsonl", make_texts(3))
        write_jsonl(folder / "locked" / "b.jsonl", make_texts(3))
        (folder / "locked").chmod(0)
        with ordinary_user():
            _, _, problems = listed(folder / pattern)
            assert len(problems) == 1 and "locked: the folder cannot be read" in problems[0]
            assert listed(folder / "open" / "*.jsonl") == (["a.jsonl"], [], [])
    finally:
        (folder / "locked").chmod(0o700)
        shutil.rmtree(folder)


def test_a_folder_gives_only_files_of_the_format(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    for name in ("README.md", "_SUCCESS", "x.csv", "b.txt", "c.jsonl.gz"):
        (tmp_path / name).write_bytes(b"x")
    others = ["README.md", "_SUCCESS", "x.csv"]
    taken, ignored, problems = listed(tmp_path, format="jsonl")
    assert (taken, sorted(ignored), problems) == (["a.jsonl", "c.jsonl.gz"], sorted([*others, "b.txt"]), [])
    taken, ignored, problems = listed(tmp_path)
    assert (taken, sorted(ignored)) == (["a.jsonl", "b.txt", "c.jsonl.gz"], sorted(others))
    assert listed(tmp_path / "README.md", tmp_path / "x.*", format="txt")[0] == ["README.md", "x.csv"]
    _, _, problems = listed(tmp_path / "README.md")
    assert "txt, jsonl or parquet?" in problems[0]


def test_files_that_are_links_into_a_store_keep_name_kind_and_compression(tmp_path):
    """The layout of the Hugging Face cache and of DVC."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "ab12").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    for name in ("train.jsonl.gz", "twin.jsonl.gz"):
        (snapshot / name).symlink_to(Path("..") / "blobs" / "ab12")
    for path in (snapshot, snapshot / "*.gz", snapshot / "train.jsonl.gz"):
        files, _, problems = list_corpus(0, CorpusSection(name="x", paths=[str(path)], root=str(snapshot)))
        assert [(f.relative, f.format, f.compression) for f in files] == [("train.jsonl.gz", "jsonl", ".gz")]
        assert problems == []


def test_a_name_that_reads_like_a_pattern_is_a_name_first(tmp_path):
    (tmp_path / "wiki[2024].txt").write_text("one\n")
    assert listed(tmp_path / "wiki[2024].txt") == (["wiki[2024].txt"], [], [])
    (tmp_path / "wiki2.txt").write_text("one\n")
    assert listed(tmp_path / "wiki[12].txt") == (["wiki2.txt"], [], [])


def test_relative_paths_and_the_home_folder(tmp_path, monkeypatch):
    folder = tmp_path / "odd[1]"
    write_jsonl(folder / "raw" / "a.jsonl", make_texts(3))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    for path in ("raw", "raw/*.jsonl", "raw/a.jsonl", "~/raw"):
        assert listed(path) == (["a.jsonl"], [], []), path
    assert listed("~/raw", root="~") == (["raw/a.jsonl"], [], [])


def test_run_says_how_many_files_are_not_taken(tmp_path):
    write_jsonl(tmp_path / "raw" / "a.jsonl", make_texts(300))
    for name in ("notes.md", "_SUCCESS"):
        (tmp_path / "raw" / name).write_text("x")
    result = command_line(settings(tmp_path / "out", [tmp_path / "raw"]), tmp_path, "run")
    assert result.returncode == 0 and "2 file(s) in the input folders are not taken" in result.stderr


def test_a_name_that_is_not_utf8_is_told(tmp_path):
    raw = tmp_path / "raw"
    write_jsonl(raw / "a.jsonl", make_texts(300))
    for name in ("法律.jsonl", "说明.md"):
        with open(os.path.join(os.fsencode(raw), name.encode("gbk")), "w") as file:
            file.write('{"text": "one"}\n')
    for command in ("plan", "run"):
        result = command_line(settings(tmp_path / "out", [raw]), tmp_path, command)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert f"corpora.0 (made): '{raw}/\\udcb7" in line and ".jsonl': the name is not UTF-8" in line
    os.unlink(os.path.join(os.fsencode(raw), "法律.jsonl".encode("gbk")))
    result = command_line(settings(tmp_path / "out", [raw]), tmp_path, "plan")
    assert result.returncode == 0 and ".md' (not a text file of the format)" in result.stdout


def test_a_long_listing_says_how_far_it_is(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text("one\n")
    monkeypatch.setattr(inputs, "_TELL_SECONDS", 0)
    said: list[str] = []
    files, _, _ = list_corpus(0, CorpusSection(name="x", paths=[str(tmp_path)]), said.append)
    assert [file.relative for file in files] == [f"{number:02d}.txt" for number in range(30)]
    assert said[-1] == "corpus x: looked at 29 of 30 files"


def test_files_far_away_are_looked_at_many_at_a_time_in_order(monkeypatch):
    system = fsspec.filesystem("memory")
    names = [f"{number:03d}.txt" for number in range(60)]
    for name in reversed(names):
        system.pipe_file(f"/many/{name}", b"one\n")
    original, at_work, most = inputs.stamp_of, [], []

    def slowly(path, handle=None):
        at_work.append(path)
        most.append(len(at_work))
        time.sleep(0.01)
        at_work.remove(path)
        return original(path, handle)

    monkeypatch.setattr(inputs, "stamp_of", slowly)
    taken, _, problems = listed("memory://many")
    assert (taken, problems) == (names, []) and max(most) > 4
