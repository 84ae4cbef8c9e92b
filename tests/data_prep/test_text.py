"""Text output: every line once, moved as it is or cleaned, the same bytes by the quick way and by the careful one."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash
import yaml
import zstandard

from data_prep import merge, run, sources, spill, text
from data_prep import plan as plan_module
from data_prep import scatter as scatter_module
from data_prep.__main__ import main
from data_prep.audit import verify
from data_prep.config import PrepareConfig
from data_prep.decompress import zstd_frames
from data_prep.errors import AuditError, DataPrepError
from data_prep.executor import LocalExecutor
from data_prep.fingerprint import line_sum
from data_prep.progress import RunProgress
from data_prep.shards import ShardError, SplitReader
from tests.data_prep.made import make_texts, prepare, settings

_AS_IT_IS = {"unicode": "none", "strip_control": False, "collapse_whitespace": False}
_ODD = [
    b"carriage\r",
    b"\xff\xfe not UTF-8",
    b"a \x00 b",
    b"",
    b"   ",
    "\u3000\u3000".encode(),
    "\u3000x".encode(),
]


def tree_of(folder: Path, output: str, **sections) -> dict:
    tree = settings(
        folder / output, [folder / "raw"], cleaning=_AS_IT_IS, words={"segmenter": "none"}, **sections
    )
    tree["corpora"][0]["format"] = "txt"
    tree["shards"] |= {"content": "text", "validation_share": 0}
    return tree


def lines_of(output: Path) -> list[bytes]:
    parts = sorted((output / "train").glob("part-*"))
    data = b"".join(
        zstandard.ZstdDecompressor().stream_reader(part.open("rb"), read_across_frames=True).read()
        for part in parts
    )
    assert data.endswith(b"\n")
    return data[:-1].split(b"\n")


@pytest.fixture
def raw(tmp_path, monkeypatch) -> list[bytes]:
    """Files of lines, plain and odd ones, over several blocks; returns the lines that are expected."""
    for module in (sources, plan_module, text):
        monkeypatch.setattr(module, "BLOCK_BYTES", 9000)
    monkeypatch.setattr(text, "_CHUNK_BYTES", 1500)
    monkeypatch.setattr(text, "_LINES", 4)
    lines = [line.encode() for line in make_texts(1500)]
    mixed = [
        line
        for n, line in enumerate(lines[:700])
        for line in ([line, _ODD[n // 50 % 7]] if n % 50 == 0 else [line])
    ]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "odd.txt").write_bytes(b"\n".join(mixed))
    (tmp_path / "raw" / "plain.txt").write_bytes(b"\n".join(lines[700:]) + b"\n")
    good = {b"carriage\r": b"carriage", b"a \x00 b": b"a  b", _ODD[6]: _ODD[6]}
    return sorted(lines + [good[_ODD[n % 7]] for n in range(14) if _ODD[n % 7] in good])


def test_every_line_is_there_once_and_the_quick_way_gives_the_bytes_of_the_careful_one(
    tmp_path, raw, monkeypatch
):
    manifest = prepare(tree_of(tmp_path, "quick", resources={"task_bytes": 20_000}))
    assert sorted(lines_of(tmp_path / "quick")) == raw
    assert lines_of(tmp_path / "quick") != raw and len(manifest.splits["train"].shards) > 3
    source = manifest.sources[0]
    assert (
        source["read"] == 1514
        and source["quarantined"] == {"invalid_utf8": 2}
        and source["dropped"] == {"empty": 6}
    )
    monkeypatch.setattr(scatter_module, "is_plain_text", lambda file: False)
    small = {"task_bytes": 1, "worker_memory_bytes": 128 * 1024**2, "spill": "lz4"}
    assert prepare(tree_of(tmp_path, "careful", resources=small)).content_hash == manifest.content_hash


def test_a_function_that_may_return_line_ends_is_refused(tmp_path):
    tree = tree_of(tmp_path, "out")
    tree["cleaning"] = _AS_IT_IS | {"functions": ["tests.data_prep.functions:first_line"]}
    with pytest.raises(
        ValueError, match="cleaning.functions: may return line ends, .*collapse_whitespace=true"
    ):
        PrepareConfig.model_validate(tree)
    tree["cleaning"]["collapse_whitespace"] = True
    PrepareConfig.model_validate(tree)


@pytest.mark.parametrize("name", ["part-000099.txt.zst", "part-000099.txt", "shard-000099.tar", "other.tar"])
def test_verify_finds_a_part_that_is_not_of_the_data_set(tmp_path, raw, name):
    prepare(tree_of(tmp_path, "out"))
    verify(tmp_path / "out", LocalExecutor(1), RunProgress(None, 60))
    (tmp_path / "out" / "train" / name).write_bytes(b"a line of somebody else\n")
    with pytest.raises(AuditError, match=f"{name}: not a shard of this data set; take it out of the folder"):
        verify(tmp_path / "out", LocalExecutor(1), RunProgress(None, 60))


def test_an_input_file_that_is_gone_is_named_on_the_quick_way(tmp_path, raw, monkeypatch):
    original = run.run_scatter

    def when_it_is_gone(plan, *others):
        Path(plan.files[0].path).unlink()
        return original(plan, *others)

    monkeypatch.setattr(run, "run_scatter", when_it_is_gone)
    with pytest.raises(
        DataPrepError, match=rf"^{tmp_path}/raw/odd.txt: cannot be read \(No such file or directory\)"
    ):
        prepare(tree_of(tmp_path, "out"))


@pytest.mark.parametrize("last", [b"plain\n", b"odd\r\n"], ids=["quick", "careful at the end"])
def test_a_file_that_changes_on_the_quick_way_is_lost_whole(tmp_path, monkeypatch, last):
    """Another program writes to it when the first lines of its only block have been taken."""
    monkeypatch.setattr(text, "_CHUNK_BYTES", 1500)
    for name in ("stays", "grows"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        lines = b"\n".join(line.encode() for line in make_texts(200)) + b"\n" + last
        (tmp_path / "raw" / f"{name}.txt").write_bytes(lines)
    original = text._as_they_are

    def and_grows(values, lengths, keys, book):
        if (tmp_path / "raw" / "stays.txt").stat().st_size == (tmp_path / "raw" / "grows.txt").stat().st_size:
            with (tmp_path / "raw" / "grows.txt").open("ab") as file:
                file.write(b"one more\n")
        return original(values, lengths, keys, book)

    monkeypatch.setattr(text, "_as_they_are", and_grows)
    (source,) = prepare(tree_of(tmp_path, "out")).sources
    assert source["quarantined"] == {"file_changed": 1} and source["written"] == 201


def test_the_bytes_of_a_part_do_not_tell_the_memory_of_its_worker(tmp_path, raw, monkeypatch):
    monkeypatch.setattr(text, "_FRAME_BYTES", 5000)
    parts = []
    for name in ("much", "little"):
        prepare(tree_of(tmp_path, name))
        parts.append({path.name: path.read_bytes() for path in (tmp_path / name / "train").iterdir()})
        monkeypatch.setattr(merge, "_LOADED_SHARE", 1 / 65536)
        monkeypatch.setattr(spill, "_SORT_BYTES", 700)
        monkeypatch.setattr("data_prep.run.frame_bytes", lambda plan: 1000)
    assert len(parts[0]) > 3 and parts[0] == parts[1]
    path = tmp_path / "much" / "train" / "part-000001.txt.zst"
    with path.open("rb") as file:
        frames = zstd_frames(file, path.stat().st_size)
    assert [after[1] - before[1] for before, after in pairwise(frames)][:3] == [5000] * 3


@pytest.mark.parametrize("forgery", ["gone", "doubled"])
def test_verify_finds_a_line_that_is_gone_or_doubled_although_every_checksum_agrees(tmp_path, raw, forgery):
    tree = tree_of(tmp_path, "out")
    tree["shards"]["compress_text"] = False
    config, progress = PrepareConfig.model_validate(tree), RunProgress(None, 60)
    manifest = prepare(tree)
    verify(tmp_path / "out", LocalExecutor(1), progress, config)
    with pytest.raises(ShardError, match="holds shuffled text"):
        SplitReader(tmp_path / "out", "train")
    entry = manifest.splits["train"].shards[0]
    shard = tmp_path / "out" / "train" / entry.name
    line, _, rest = shard.read_bytes().partition(b"\n")
    forged = rest if forgery == "gone" else line + b"\n" + line + b"\n" + rest
    shard.write_bytes(forged)
    with pytest.raises(AuditError, match=f"{entry.name}: .* lines of .* bytes, the manifest says"):
        verify(tmp_path / "out", LocalExecutor(1), progress, config)
    more, size = (-1, -len(line) - 1) if forgery == "gone" else (1, len(line) + 1)
    content = xxhash.xxh3_128_hexdigest(forged)
    counts = {"rows": entry.rows + more, "documents": entry.documents + more, "tokens": entry.tokens + size}
    shards = [
        replace(entry, content=content, file_bytes=len(forged), **counts),
        *manifest.splits["train"].shards[1:],
    ]
    split = manifest.splits["train"]
    totals = {"rows": split.rows + more, "documents": split.documents + more, "tokens": split.tokens + size}
    splits = manifest.splits | {"train": replace(split, shards=shards, **totals)}
    records = manifest.records | {key: manifest.records[key] + more for key in ("read", "written")}
    sources = [
        source | {key: source[key] + more for key in ("read", "written")} for source in manifest.sources
    ]
    whole = replace(manifest, splits=splits, records=records, sources=sources)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(whole.to_json()))
    with pytest.raises(AuditError) as told:
        verify(tmp_path / "out", LocalExecutor(1), progress, config)
    assert (
        str(told.value)
        == "train: the documents are not those of pass 1 (lost, doubled or altered; sum differs)"
    )


def test_the_sum_of_lines_knows_no_order_but_every_line():
    draw = random.Random(1)
    lines = [bytes(draw.choices(b"abc \xe4", k=draw.randint(0, 30))) + b"\n" for _ in range(500)]

    def of(lines: list[bytes]) -> int:
        return line_sum(np.frombuffer(b"".join(lines), np.uint8), np.array([len(line) for line in lines]))

    whole = of(lines)
    assert of(sorted(lines)) == whole
    assert (of(lines[:100]) + of(lines[100:])) % 2**64 == whole
    for changed in (
        lines[1:],
        [*lines, lines[7]],
        [*lines[1:], lines[0][:-1] + b"x\n"],
        [*lines[2:], lines[0], lines[0]],
    ):
        assert of(changed) != whole


def test_text_is_told_in_lines_and_bytes(tmp_path, capsys):
    texts = make_texts(300)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    shards = {"content": "text", "validation_share": 0}
    tree = settings(tmp_path / "out", [tmp_path / "a.txt"], shards=shards)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["--config", str(tmp_path / "config.yaml")]
    assert main(["run", *arguments]) == main(["verify", *arguments]) == 0
    size_bytes = sum(len(line.encode()) + 1 for line in texts)
    said = capsys.readouterr()
    assert said.out.startswith(f"train: 300 lines, {size_bytes:,} bytes, ")
    for stage in ("gather", "verify"):
        (line,) = [line for line in said.err.splitlines() if line.startswith(f"{stage}: ")]
        assert f"100%, {size_bytes / 1e6:.1f} MB at " in line


def test_a_validation_share_that_leaves_nothing_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(make_texts(50)))
    shards = {"content": "text", "validation_share": 0.9999999}
    with pytest.raises(DataPrepError, match=r"all 50 are for validation; lower shards\.validation_share"):
        prepare(settings(tmp_path / "out", [tmp_path / "a.txt"], shards=shards))
