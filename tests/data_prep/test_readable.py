"""A corpus that gives no text is refused before it is read, and says what it holds instead."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_prep.made import command_line, make_texts, settings, write_jsonl


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_wrong_text_field_is_told_at_once_with_the_keys_there_are(tmp_path, command):
    good = write_jsonl(tmp_path / "good.jsonl", make_texts(300))
    lines = [json.dumps({"url": "x", "content": text}) + "\n" for text in make_texts(300)]
    with gzip.open(tmp_path / "bad.jsonl.gz", "wt") as file:
        file.writelines(["\n", *lines])
    tree = settings(tmp_path / "out", [])
    corpora = [("one", good), ("two", tmp_path / "bad.jsonl.gz")]
    tree["corpora"] = [{"name": name, "paths": [str(path)]} for name, path in corpora]
    result = command_line(tree, tmp_path, command)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    told = [line for line in result.stderr.splitlines() if "corpora." in line]
    assert len(told) == 1 and told[0].startswith(
        "error: corpora.1 (two): no record gives a text (300 missing_field"
    )
    assert told[0].endswith("; text_field is 'text', a record has 'url', 'content'; set text_field")
    assert "scatter" not in result.stderr and "sample" not in result.stderr


def test_text_of_another_encoding_and_lost_records_that_are_allowed(tmp_path):
    (tmp_path / "a.txt").write_bytes("\n".join(["法律规定"] * 300).encode("gbk"))
    tree = settings(tmp_path / "out", [tmp_path / "a.txt"])
    result = command_line(tree, tmp_path, "plan")
    assert result.returncode == 2 and "300 invalid_utf8" in result.stderr and "UTF-8" in result.stderr
    allowed = command_line(tree | {"quarantine": {"max_record_share": 1.0}}, tmp_path, "plan")
    assert allowed.returncode == 0 and "warning: cleaning leaves nothing" in allowed.stdout


def test_a_file_that_begins_badly_is_not_the_corpus(tmp_path):
    write_jsonl(tmp_path / "raw" / "b.jsonl", make_texts(50))
    (tmp_path / "raw" / "a.jsonl").write_text('{"title": "no text"}\n' * 2000)
    result = command_line(settings(tmp_path / "out", [tmp_path / "raw"]), tmp_path, "plan")
    assert result.returncode == 0, result.stderr


def test_a_column_of_parquet_may_begin_with_nulls(tmp_path):
    pq.write_table(pa.table({"text": [None] * 2000 + make_texts(50)}), tmp_path / "a.parquet")
    tree = settings(tmp_path / "out", [tmp_path / "a.parquet"])
    assert command_line(tree, tmp_path, "plan").returncode == 0


def test_cleaning_that_leaves_nothing_is_a_warning(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    tree = settings(tmp_path / "out", [source], cleaning={"min_characters": 5000})
    result = command_line(tree, tmp_path, "plan")
    assert result.returncode == 0 and "warning: cleaning leaves nothing of the records" in result.stdout
