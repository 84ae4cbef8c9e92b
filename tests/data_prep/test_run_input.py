"""The whole pipeline over bad input: dropped, quarantined or refused, each with a reason."""

from __future__ import annotations

import gzip
import json

import pytest

from tests.data_prep.made import (
    ROOT,
    command_line,
    content_files,
    make_texts,
    prepare,
    settings,
    write_jsonl,
)


def test_bad_input_is_dropped_or_quarantined_and_its_neighbours_stay(tmp_path):
    good = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in make_texts(200)]
    bad = [
        b'{"text": "cut off',
        b'{"body": "other field"}',
        b'{"text": "\xff\xfe"}',
        b'["no object"]',
        b'{"text": 7}',
        b'{"text": "' + b"long " * 1000 + b'"}',
    ]
    dropped = [b"", b'{"text": " "}', b'{"text": "x"}']
    lines = [line for pair in zip(good[:9], bad + dropped, strict=True) for line in pair] + good[9:]
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(lines))
    output = tmp_path / "out"
    cleaning = {"max_record_bytes": 2000, "min_characters": 2}
    manifest = prepare(settings(output, [tmp_path / "a.jsonl"], cleaning=cleaning))
    source = manifest.sources[0]
    assert (source["read"], source["written"]) == (209, 200)
    assert source["dropped"] == {"empty": 2, "too_short": 1}
    assert source["quarantined"] == {
        "field_is_not_text": 1,
        "invalid_json": 1,
        "invalid_utf8": 1,
        "missing_field": 1,
        "not_a_json_object": 1,
        "record_too_large": 1,
    }
    entries = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    data = (tmp_path / "a.jsonl").read_bytes()
    assert [data[entry["offset"] :].startswith(line) for entry, line in zip(entries, bad, strict=True)] == [
        True
    ] * 6
    assert 'data_prep_records_total{outcome="quarantined"} 6' in (output / "metrics.prom").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpora": [{"name": "x", "paths": ["/nowhere/*.jsonl"]}]}, "/nowhere/*.jsonl: no such file"),
        ({"sed": 3}, "sed: unknown key; did you mean 'seed'?"),
        ({"seed": "many"}, "seed: "),
        ({"shards": {"row_tokens": 2, "zstd_level": 99}}, "shards.zstd_level: "),
        ({"tokenizer": {"train": {"vocab_size": 50_000}}}, "the sample supports only"),
        ({"tokenizer": {"load": "/nowhere.model"}}, "/nowhere.model: the tokenizer model cannot be read"),
        ({"corpora": [{"name": "x", "paths": ["SOURCE"], "text_field": "body"}]}, "missing_field"),
        ({"output_dir": "/proc/nothing"}, "/proc/nothing"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, change, message):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    tree = settings(tmp_path / "out", [source]) | change
    result = command_line(json.loads(json.dumps(tree).replace("SOURCE", str(source))), tmp_path, "run")
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_empty_input_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    for command in ("plan", "run"):
        result = command_line(settings(tmp_path / "out", [tmp_path / "a.txt"]), tmp_path, command)
        assert result.returncode == 2 and "the input is empty" in result.stderr


def test_a_truncated_file_costs_one_record_and_the_books_balance(tmp_path):
    texts = make_texts(2000)
    plain = write_jsonl(tmp_path / "whole.jsonl", texts[:300])
    packed = gzip.compress(write_jsonl(tmp_path / "cut.tmp", texts[300:]).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    manifest = prepare(settings(tmp_path / "out", [plain, tmp_path / "cut.jsonl.gz"]))
    source = manifest.sources[0]
    assert source["quarantined"] == {"truncated_compression": 1}
    assert source["read"] == source["written"] + 1 and 600 < source["written"] < 2000
    result = command_line(settings(tmp_path / "out", [plain]), tmp_path, "verify")
    assert result.returncode == 0, result.stderr


def test_deep_nesting_is_quarantined_alike_by_any_workers(tmp_path):
    good = [json.dumps({"text": text}, ensure_ascii=False) for text in make_texts(300)]
    deep = [f'{{"a": {"[" * n}{"]" * n}, "text": "level {n}"}}' for n in range(150, 1050, 10)]
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text("\n".join([*good, *deep]) + "\n")
    for workers in (1, 2):
        manifest = prepare(
            settings(
                tmp_path / str(workers),
                [tmp_path / "*.jsonl"],
                resources={"workers": workers, "task_bytes": 1},
            )
        )
    assert manifest.sources[0]["quarantined"] == {"nested_too_deep": 2 * 85}
    assert content_files(tmp_path / "1") == content_files(tmp_path / "2")


def test_paths_at_home_and_forbidden_places(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "raw" / "a.jsonl", make_texts(300))
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = settings("~/out", ["~/raw"]) | {"work_dir": "~/scratch"}
    tree["corpora"][0]["root"] = "~"
    prepare(tree)
    model = tmp_path / "m.model"
    model.write_bytes((tmp_path / "out" / "tokenizer" / "tokenizer.model").read_bytes())
    prepare(settings("~/out2", ["~/raw"], tokenizer={"load": "~/m.model"}))
    assert (tmp_path / "scratch").is_dir() and not (ROOT / "~").exists()
    long_name = command_line(settings(tmp_path / ("x" * 300), ["~/raw"]), tmp_path, "plan")
    assert long_name.returncode == 2 and "File name too long" in long_name.stderr
    assert long_name.stderr.startswith("error: /") and "Traceback" not in long_name.stderr
