"""What a run promises of its input and its processes, with real files and real workers."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from data_prep.errors import DataPrepError
from data_prep.shards import Manifest, ShardError
from tests.data_prep.made import ROOT, command_line, make_texts, prepare, settings, write_jsonl
from tests.data_prep.test_run import documents_of


def damaged_corpus(folder: Path) -> dict[str, list[str]]:
    """One file for every kind of damage; the texts that must come through, by file."""
    texts = make_texts(2000)
    good = {
        "utf8.txt": texts[:50],
        "bytes.txt": texts[50:100],
        "crlf.txt": texts[100:150],
        "end.txt": texts[150:200],
        "lines.jsonl": texts[200:250],
    }
    folder.mkdir()
    raw = {name: [text.encode() for text in lines] for name, lines in good.items()}
    (folder / "utf8.txt").write_bytes(
        b"\n".join([*raw["utf8.txt"][:9], b"bad \xff\xfe \xe6\xb3", *raw["utf8.txt"][9:], b""])
    )
    zero = [line + b"\0" if i == 5 else line for i, line in enumerate(raw["bytes.txt"])]
    (folder / "bytes.txt").write_bytes(b"\n".join([*zero[:20], b"\xff", *zero[20:], b""]))
    (folder / "crlf.txt").write_bytes(b"\r\n".join([*raw["crlf.txt"], b""]))
    (folder / "end.txt").write_bytes(b"\n".join(raw["end.txt"]))
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in good["lines.jsonl"]]
    lines[10:10] = [b'{"text": "broken', b'{"body": "no text"}', b"not json at all"]
    (folder / "lines.jsonl").write_bytes(b"\n".join([*lines, b""]))
    data = "".join(f"{text}\n" for text in texts[300:1000]).encode()
    (folder / "cut.txt.gz").write_bytes(gzip.compress(data)[:9000])
    draw = random.Random(0)
    packed = zstandard.compress("".join(f"{i} {draw.randbytes(40).hex()}\n" for i in range(6000)).encode())
    (folder / "cut.txt.zst").write_bytes(packed[: len(packed) * 2 // 3])
    for name in ("empty.txt", "empty.jsonl"):
        (folder / name).write_bytes(b"")
    (folder / "empty.txt.gz").write_bytes(gzip.compress(b""))
    return good


@pytest.mark.parametrize("task_bytes", [1, 10**9])
def test_damage_is_quarantined_with_its_place_and_costs_no_neighbour(prepared, tmp_path, task_bytes):
    good = damaged_corpus(tmp_path / "raw")
    tokenizer = {"load": str(prepared / "tokenizer" / "tokenizer.model")}
    manifest = prepare(
        settings(
            tmp_path / "out", [tmp_path / "raw"], tokenizer=tokenizer, resources={"task_bytes": task_bytes}
        )
    )
    names = [file["path"] for file in manifest.files]
    written: dict[str, int] = {}
    for split in ("train", "validation"):
        for (file, _, _), _ in documents_of(tmp_path / "out", split):
            written[names[file]] = written.get(names[file], 0) + 1
    assert {name: written[name] for name in good} == dict.fromkeys(good, 50)
    assert 100 < written["cut.txt.gz"] < 700 and 100 < written["cut.txt.zst"] < 6000
    assert not {"empty.txt", "empty.jsonl", "empty.txt.gz"} & written.keys()
    entries = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    found = {(entry["file"], entry["reason"]) for entry in entries}
    assert found == {
        ("utf8.txt", "invalid_utf8"),
        ("bytes.txt", "invalid_utf8"),
        ("lines.jsonl", "invalid_json"),
        ("lines.jsonl", "missing_field"),
        ("cut.txt.gz", "truncated_compression"),
        ("cut.txt.zst", "truncated_compression"),
    }
    assert len(entries) == 7 == manifest.records["quarantined"]
    for entry in entries:
        data = (tmp_path / "raw" / entry["file"]).read_bytes()
        if entry["reason"] != "truncated_compression":
            line = data[entry["offset"] :].split(b"\n")[0]
            assert line.decode(errors="replace") == entry["excerpt"]
            assert entry["record"] == data[: entry["offset"]].count(b"\n") and entry["block"] == 0
        else:
            assert entry["record"] == written[entry["file"]]


def test_losses_above_a_limit_fail_the_run_and_a_higher_limit_goes_on(prepared, tmp_path):
    damaged_corpus(tmp_path / "raw")
    tree = settings(
        tmp_path / "out", [tmp_path / "raw"], quarantine={"max_record_share": 0.001, "max_file_share": 0.1}
    )
    tree["tokenizer"] = {"load": str(prepared / "tokenizer" / "tokenizer.model")}
    failed = command_line(tree, tmp_path, "run")
    assert failed.returncode == 2 and not (tmp_path / "out" / "manifest.json").exists()
    message = failed.stderr.splitlines()[-1]
    assert (
        message.startswith("error: too much could not be read: 5 of ")
        and "quarantine.max_record_share" in message
    )
    assert "2 of 10 files cut short" in message and "made: invalid_json 2" in message
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 7
    (work,) = (tmp_path / "out" / ".work").iterdir()
    made = (work / "scatter" / "task-000000.spill").stat().st_mtime_ns
    tree["quarantine"] = {"max_record_share": 0.01, "max_file_share": 0.2}
    again = command_line(tree, tmp_path, "run")
    assert again.returncode == 0 and made, again.stderr
    assert "7 dropped or quarantined" in again.stderr
    assert "\nquarantined: " in again.stdout and "invalid_utf8 2" in again.stdout
    assert "no document was truncated" in again.stdout


def test_a_file_with_many_gaps_is_one_file_cut_short(prepared, tmp_path):
    """A parquet file of which every row group is damaged, read by several tasks, beside three that are whole."""
    for number in range(4):
        write_jsonl(tmp_path / "raw" / f"{number}.jsonl", make_texts(50, seed=number))
    (tmp_path / "raw" / "0.jsonl").unlink()
    path = tmp_path / "raw" / "0.parquet"
    pq.write_table(pa.table({"text": make_texts(200)}), path, row_group_size=50, compression="snappy")
    data, metadata = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata
    for number in range(metadata.num_row_groups):
        column = metadata.row_group(number).column(0)
        begin = column.dictionary_page_offset or column.data_page_offset
        data[begin : begin + 100] = b"\xff" * 100
    path.write_bytes(data)
    tree = settings(
        tmp_path / "out",
        [tmp_path / "raw"],
        tokenizer={"load": str(prepared / "tokenizer" / "tokenizer.model")},
        quarantine={"max_record_share": 0.0, "max_file_share": 0.24},
        resources={"task_bytes": 1},
    )
    with pytest.raises(DataPrepError, match=r"1 of 4 files cut short, 25\.000%, above .*damaged_parquet 4\)"):
        prepare(tree)
    manifest = prepare(tree | {"quarantine": {"max_record_share": 0.0, "max_file_share": 0.25}})
    assert manifest.sources[0]["quarantined"] == {"damaged_parquet": 4} and manifest.records["written"] == 150


def test_a_run_that_loses_far_too_much_stops_early_and_goes_on_with_a_higher_limit(prepared, tmp_path):
    for number in range(20):
        write_jsonl(tmp_path / "raw" / f"{number:02d}.jsonl", make_texts(60, seed=number))
    for number in range(1, 12):  # not the first, which is looked at before
        (tmp_path / "raw" / f"{number:02d}.jsonl").write_text('{"text": 3}\n' * 60)
    tree = settings(tmp_path / "out", [tmp_path / "raw"], resources={"task_bytes": 1})
    tree |= {"quarantine": {"max_record_share": 0.01}}
    tree["tokenizer"] = {"load": str(prepared / "tokenizer" / "tokenizer.model")}
    with pytest.raises(DataPrepError, match=r"too much could not be read: .* field_is_not_text"):
        prepare(tree)
    done = len(list((tmp_path / "out").glob(".work/*/scatter/task-??????.json")))
    assert 2 < done < 12
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 60 * (done - 1)
    manifest = prepare(tree | {"quarantine": {"max_record_share": 0.6}})
    assert manifest.records["quarantined"] == 660 and manifest.records["written"] == 540
    assert command_line(tree, tmp_path, "verify").returncode == 0


def test_a_file_that_changes_during_the_run_is_lost_alone(prepared, tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "growing.txt").write_text("the first\n" + "\n".join(make_texts(40)) + "\n")
    (raw / "neighbour.txt").write_text("\n".join(make_texts(200, seed=2)) + "\n")
    monkeypatch.setenv("GROWING_FILE", str(raw / "growing.txt"))
    tree = settings(
        tmp_path / "out",
        [raw],
        cleaning={"functions": ["tests.data_prep.functions:grow_the_file"]},
        resources={"workers": 2},
    )
    tree["tokenizer"] = {"load": str(prepared / "tokenizer" / "tokenizer.model")}
    result = command_line(tree, tmp_path, "run")
    assert result.returncode == 0, result.stderr
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.sources[0]["quarantined"] == {"file_changed": 1}
    assert manifest.records["written"] == 200 and manifest.records["read"] == 201
    (entry,) = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert (entry["file"], entry["offset"], entry["reason"]) == ("growing.txt", 0, "file_changed")


def test_a_manifest_that_points_out_of_its_folder_is_refused(prepared, tmp_path):
    tree = json.loads((prepared / "manifest.json").read_text())
    shard = tree["splits"]["train"]["shards"][0] | {"name": "../x"}
    splits = tree["splits"] | {"train": tree["splits"]["train"] | {"shards": [shard]}}
    for change in (
        {"tokenizer": {"file": "../../etc/passwd", "sha256": ""}},
        {"token_counts": {"file": "/etc/passwd", "xxh3": ""}},
        {"splits": splits},
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(tree | change))
        with pytest.raises(ShardError, match="names a file outside of its folder"):
            Manifest.load(tmp_path)


_SPY = """
import os, sys, pathlib
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "sutrain"):
            pathlib.Path(os.environ["SPY"], f"{name}-{os.getpid()}").write_text(" ".join(sys.argv))
sys.meta_path.insert(0, Spy())
pathlib.Path(os.environ["SPY"], f"process-{os.getpid()}").touch()
"""


def test_torch_is_imported_by_no_process_of_a_preparation(tmp_path):
    """A spy in front of the import system of the driver and of every worker, which are real processes."""
    (tmp_path / "sitecustomize.py").write_text(_SPY)
    (tmp_path / "spy").mkdir()
    (tmp_path / "a.txt").write_text("\n".join(make_texts(300)) + "\n")
    (tmp_path / "b.txt").write_text("\n".join(make_texts(300, seed=1)) + "\n")
    resources = {"workers": 2, "task_bytes": 1}
    tree = settings(
        tmp_path / "out", [tmp_path / "?.txt"], resources=resources, deduplication={"method": "exact"}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "SPY": str(tmp_path / "spy"),
    }
    command = [sys.executable, "-m", "data_prep", "run", "--config", str(tmp_path / "config.yaml")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = sorted(path.name.partition("-")[0] for path in (tmp_path / "spy").iterdir())
    assert seen.count("process") >= 3 and set(seen) == {"process"}


_LOADER = """
import sys
import numpy as np
from torch.utils.data import DataLoader

HANDLER

dataset = webdataset.WebDataset(SHARDS, shardshuffle=False).map(decode)

def checked(sample):
    assert not {name.partition(".")[0] for name in sys.modules} & {"data_prep", "sutrain"}
    return sample

if __name__ == "__main__":
    loader = DataLoader(dataset.map(checked), batch_size=None, num_workers=2)
    blocks = list(loader)
    tokens = np.concatenate([np.asarray(block["tokens"]) for block in blocks])
    words = np.concatenate([np.asarray(block["words"]) for block in blocks])
    print(len(blocks), *tokens.shape, int(tokens.astype(np.int64).sum()), int(words.sum()))
    assert not {name.partition(".")[0] for name in sys.modules} & {"data_prep", "sutrain"}
"""


def test_stock_webdataset_decodes_every_sample_in_two_loader_workers_without_us(prepared, tmp_path):
    """The handler of docs/data_format.md, at most five lines, in a program that knows neither of our packages."""
    text = (ROOT / "docs" / "data_format.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1]
    handler = snippet[: snippet.index("dataset = ")]
    lines = handler[handler.index("def decode") :].strip().splitlines()
    assert len(lines) <= 5
    shards = [str(path) for path in sorted((prepared / "train").glob("*.tar"))]
    code = _LOADER.replace("HANDLER", handler.replace("OUTPUT", str(prepared))).replace(
        "SHARDS", repr(shards)
    )
    (tmp_path / "program.py").write_text(code)
    command = [sys.executable, str(tmp_path / "program.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    manifest = Manifest.load(prepared)
    entry = manifest.splits["train"]
    blocks, rows, row_tokens, _total, words = map(int, result.stdout.split())
    assert (rows, row_tokens) == (entry.rows, manifest.row_tokens)
    assert blocks == sum(-(-shard.rows // manifest.block_rows) for shard in entry.shards)
    counts = manifest.load_token_counts()
    assert _total == int((counts * range(len(counts))).sum()) and words > entry.documents
