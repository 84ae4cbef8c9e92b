"""Checkpoints: atomic, checked, pruned, readable at any other cut of the tensors."""

import errno
import json
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from sutrain import checkpoint as checkpoints
from sutrain import checkpoint_writer, heartbeat
from sutrain.checkpoint import MASTER, Checkpoint, CheckpointError
from sutrain.checkpoint_writer import CheckpointWriter, Keep, prune, save_checkpoint, sweep
from tests import warm


def save(directory, step, values=0.0, **counters):
    weight = torch.arange(12, dtype=torch.float32) + values
    slices = [(MASTER, "a", 0, weight[:5]), (MASTER, "a", 5, weight[5:]), ("moment", "b", 0, weight[:3] * 2)]
    counters |= {"updates": step, "samples_consumed": step * 8}
    return save_checkpoint(directory, step, slices, {"row|a": torch.ones(3)}, {"a": [3, 4]}, counters)


def test_any_range_is_put_together_from_the_slices_that_hold_it(tmp_path):
    found = Checkpoint(save(tmp_path, 4))
    found.verify()
    assert found.counters == {"updates": 4, "samples_consumed": 32}
    assert found.read(MASTER, "a", 3, 6).tolist() == [3, 4, 5, 6, 7, 8]
    assert found.read("moment", "b", 1, 2).tolist() == [2, 4]
    assert found.full_weights()["a"].shape == (3, 4)
    assert found.replicated()["row|a"].tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match="holds 2 of the elements 10..14 of master of a"):
        found.read(MASTER, "a", 10, 4)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "replicated.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 4)
    file = save(tmp_path, 8) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "flip":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    if name == "manifest.json" and damage == "flip":  # still valid JSON, but another number
        file.write_bytes(content.replace(b'"samples_consumed": 64', b'"samples_consumed": 65'))
    found, damaged = checkpoints.find_latest(tmp_path)
    assert found.step == 4
    assert len(damaged) == 1 and "step-00000008" in damaged[0]


def test_a_checkpoint_under_another_name_is_passed_over_with_the_reason(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 8).rename(tmp_path / "step-00000099")
    found, damaged = checkpoints.find_latest(tmp_path)
    assert found.step == 4
    assert len(damaged) == 1 and "step-00000099: holds step 8; its name was step-00000008" in damaged[0]


def test_an_interrupted_save_is_never_seen_and_swept_away(tmp_path):
    save(tmp_path, 4)
    half = tmp_path / ".writing-step-00000008"
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"half")
    assert checkpoints.find_latest(tmp_path)[0].step == 4
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_the_last_ones_and_the_best_one_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    checkpoints.mark_best(tmp_path, 2, 1.5, "40 rows")
    prune(tmp_path, keep_last=2)
    assert sorted(path.name[-1] for path in tmp_path.glob("step-*")) == ["2", "4", "5"]
    assert checkpoints.best(tmp_path) == {"step": 2, "validation_loss": 1.5, "basis": "40 rows"}
    checkpoints.mark_best(tmp_path, 5, 1.25, "40 rows")  # the last one is the best: one besides it
    prune(tmp_path, keep_last=1)
    assert sorted(path.name[-1] for path in tmp_path.glob("step-*")) == ["4", "5"]


def test_a_streak_of_broken_steps_does_not_push_out_the_newest_checkpoint_from_before_it(tmp_path):
    for step, broken_steps in enumerate((0, 0, 3, 0, 1, 7, 13, 19), 1):
        save(tmp_path, step, broken_steps=broken_steps)
        prune(tmp_path, keep_last=2)
    assert [path.name[-1] for path in checkpoints.by_age(tmp_path)] == ["8", "7", "4"]
    save(tmp_path, 9, broken_steps=25, good_step=3)  # nothing that old is left
    prune(tmp_path, keep_last=1)
    assert [path.name[-1] for path in checkpoints.by_age(tmp_path)] == ["9", "4"]
    for step in (10, 11):  # over: two good ones are there
        save(tmp_path, step)
        prune(tmp_path, keep_last=2)
    assert [path.name[-2:] for path in checkpoints.by_age(tmp_path)] == ["11", "10"]
    save(tmp_path, 12, broken_steps=1, good_step=10)  # the update of step 11 is what broke it
    prune(tmp_path, keep_last=1)
    assert [path.name[-2:] for path in checkpoints.by_age(tmp_path)] == ["12", "10"]


@pytest.fixture
def agreed(tmp_path, monkeypatch):
    """agreed(basis) -> (best loss, other basis) of a run of one rank that goes on in tmp_path."""
    monkeypatch.setattr(checkpoints.dist, "broadcast", lambda decision, source: None)
    return lambda basis: checkpoints.agree_on_latest(tmp_path, basis, torch.device("cpu"))[1:3]


def test_what_is_to_be_bettered_on_another_basis_stays_as_long_as_the_best_checkpoint_does(tmp_path, agreed):
    save(tmp_path, 4)
    checkpoints.mark_best(tmp_path, 4, 1.5, "40 rows")
    assert agreed("40 rows") == (1.5, False) and agreed("20 rows") == (float("inf"), True)
    checkpoints.mark_to_better(tmp_path, 1.75, "20 rows")
    checkpoints.mark_to_better(tmp_path, 1.25, "10 rows")
    save(tmp_path, 8)  # of a run that got worse
    assert [agreed(f"{rows} rows") for rows in (40, 20, 10)] == [(1.5, False), (1.75, False), (1.25, False)]
    checkpoints.mark_best(tmp_path, 8, 1.5, "20 rows")
    assert agreed("20 rows") == (1.5, False) and agreed("40 rows") == (float("inf"), True)


def test_a_kill_between_a_new_best_checkpoint_and_its_mark_loses_neither(tmp_path, agreed, monkeypatch):
    writer = CheckpointWriter(tmp_path, Keep(last=1))
    arguments = ([(MASTER, "a", 0, torch.arange(12.0))], {}, {"a": [3, 4]}, {})
    writer.save(4, *arguments, best=(1.5, "40 rows"))
    assert writer.wait(20)
    with monkeypatch.context() as killed:
        killed.setattr(checkpoints, "mark_best", lambda *_: sys.exit())
        writer.save(8, *arguments, best=(1.25, "40 rows"))
        with pytest.raises(SystemExit):
            writer.wait(20)
    assert checkpoints.best(tmp_path)["step"] == 4
    assert agreed("40 rows") == (1.25, False) and checkpoints.best(tmp_path)["step"] == 8
    writer.save(12, *arguments)
    assert writer.wait(20)
    prune(tmp_path, keep_last=1)
    assert [path.name[-2:] for path in checkpoints.by_age(tmp_path)] == ["12", "08"]


def test_a_best_checkpoint_that_is_gone_or_a_damaged_mark_is_none(tmp_path):
    save(tmp_path, 5)
    checkpoints.mark_best(tmp_path, 2, 1.5, "")
    assert checkpoints.best(tmp_path) is None
    (tmp_path / "best.json").write_text("{")
    assert checkpoints.best(tmp_path) is None


def test_damaged_later_checkpoints_do_not_push_out_the_intact_ones(tmp_path):
    """After a resume at 1 from under damaged 2 and 3, pruning counts what the run itself writes."""
    for step in (1, 2, 3):
        folder = save(tmp_path, step)
        if step > 1:
            (folder / "replicated.safetensors").unlink()
    found, damaged = checkpoints.find_latest(tmp_path)
    assert found.step == 1 and len(damaged) == 2
    checkpoints.set_aside(tmp_path, after_step=1)
    save(tmp_path, 2)
    prune(tmp_path, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000002"]
    assert checkpoints.find_latest(tmp_path)[0].step == 2
    assert sorted(path.name for path in tmp_path.glob(".damaged-*")) == [
        ".damaged-step-00000002",
        ".damaged-step-00000003",
    ]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from sutrain.checkpoint_writer import save_checkpoint
from sutrain.launch import explain

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    slices = [("master", "a", 0, torch.zeros(1_000_000))]
    save_checkpoint(Path(sys.argv[1]), 8, slices, {}, {"a": [1_000_000]}, {})
except OSError as error:
    print(type(error).__name__, explain(error))
"""


def test_a_disk_that_takes_no_more_gives_a_clear_line_and_keeps_the_older_checkpoint(tmp_path):
    """A limit on file size stands for a full disk: both make the same call fail with a number of the system."""
    save(tmp_path, 4)
    said = warm.run("-c", FULL_DISK, tmp_path).stdout
    assert "OSError" in said and "File too large" in said, said
    found, damaged = checkpoints.find_latest(tmp_path)
    assert found.step == 4 and not damaged


def test_the_same_step_written_again_replaces_the_old_one(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 4, values=100.0)
    found, damaged = checkpoints.find_latest(tmp_path)
    assert not damaged and found.read(MASTER, "a", 0, 1).item() == 100
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_an_unknown_format_is_refused(tmp_path):
    folder = save(tmp_path, 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": "other"}))
    with pytest.raises(CheckpointError, match="not in the format"):
        Checkpoint(folder).verify()


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert checkpoints.find_latest(tmp_path / "nowhere") == (None, [])


def test_every_byte_of_a_checkpoint_damaged_in_turn_is_noticed_or_changes_nothing(tmp_path):
    """Flipped, and cut off there: header, data, manifest. Only white space of the manifest may change unseen."""
    save(tmp_path, 4)
    folder = save(tmp_path, 8)
    reference = Checkpoint(folder)
    reference.verify()
    content, tried = reference.manifest, 0
    for name in ("rank-00000.safetensors", "replicated.safetensors", "manifest.json"):
        intact = (folder / name).read_bytes()
        for position in range(len(intact)):
            flipped = intact[:position] + bytes([intact[position] ^ 0x11]) + intact[position + 1 :]
            for damaged in (flipped, intact[:position]):
                (folder / name).write_bytes(damaged)
                found, _ = checkpoints.find_latest(tmp_path)
                tried += 1
                assert found is not None and (found.step == 4 or found.manifest == content), (name, position)
                if name != "manifest.json":
                    assert found.step == 4, (name, position)
        (folder / name).write_bytes(intact)
    assert checkpoints.find_latest(tmp_path)[0].step == 8 and tried > 1500


def test_writing_goes_on_in_the_background_one_at_a_time_from_a_copy(tmp_path, monkeypatch):
    may_write = threading.Event()
    real = checkpoint_writer.write_tensors

    def slow(file, tensors):
        assert may_write.wait(20)
        real(file, tensors)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", slow)
    writer = CheckpointWriter(tmp_path, Keep())
    weight = torch.arange(5.0)
    arguments = ({"row|a": torch.ones(3)}, {"a": [5]}, {"steps": 1})
    writer.save(1, [(MASTER, "a", 0, weight)], *arguments)
    weight += 100  # the step goes on
    said = []
    monkeypatch.setattr(heartbeat, "beat", lambda *what: said.append(what))
    assert not writer.wait(0.05) and checkpoints.find_latest(tmp_path) == (None, [])
    assert said == [("writing a checkpoint", 1)], "a slow disk is no hang"
    second = threading.Thread(target=writer.save, args=(2, [(MASTER, "a", 0, weight)], *arguments))
    second.start()
    time.sleep(0.1)
    assert second.is_alive(), "the second waits for the first"
    may_write.set()
    second.join(20)
    assert writer.wait(20)
    values = [Checkpoint(tmp_path / f"step-0000000{n}").full_weights()["a"][0].item() for n in (1, 2)]
    assert values == [0, 100]
    assert writer.buffer_bytes == 5 * 4 + 3 * 4, "the buffers are used again"


def test_files_of_all_ranks_make_one_checkpoint_and_a_failure_of_one_reaches_rank_0(tmp_path):
    """Two writers stand for two ranks: they meet in the folder alone."""
    weight = torch.arange(6.0)
    writers = [CheckpointWriter(tmp_path, Keep(), rank, 2) for rank in (0, 1)]
    writers[0].save(4, [(MASTER, "a", 0, weight[:4])], {}, {"a": [6]}, {})
    assert not writers[0].wait(0.2) and checkpoints.find_latest(tmp_path) == (None, [])
    writers[1].save(4, [(MASTER, "a", 4, weight[4:])], {}, {"a": [6]}, {})
    assert all(writer.wait(20) for writer in writers)
    found, _ = checkpoints.find_latest(tmp_path)
    assert found.full_weights()["a"].tolist() == weight.tolist()
    # A rank whose disk is full: a folder stands where its file would be.
    (tmp_path / ".writing-step-00000008/rank-00001.safetensors").mkdir(parents=True)
    for writer in writers:
        writer.save(8, [(MASTER, "a", 0, weight)], {}, {"a": [6]}, {})
    with pytest.raises(OSError, match="rank-00001: Is a directory"):
        writers[0].wait(20)
    with pytest.raises(IsADirectoryError):
        writers[1].wait(20)
    found, damaged = checkpoints.find_latest(tmp_path)
    assert found.step == 4 and not damaged
    # One whose disk is so full that it takes no line about it either.
    (tmp_path / ".writing-step-00000012").mkdir()
    (tmp_path / ".writing-step-00000012/rank-00001.failed").touch()
    writers[0].save(12, [(MASTER, "a", 0, weight)], {}, {"a": [6]}, {})
    with pytest.raises(OSError, match="rank-00001: could not write its files; its own message says why"):
        writers[0].wait(20)


def written_at(folder, hours):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["xxh3_128"]
    manifest["written_unix_seconds"] = int(hours * 3600)
    manifest["xxh3_128"] = checkpoints.json_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_one_checkpoint_every_so_many_hours_is_kept_for_good(tmp_path):
    for step in range(1, 9):
        written_at(save(tmp_path, step), hours=step / 2)
        prune(tmp_path, keep_last=1, keep_every_hours=1)
    assert [path.name[-1] for path in checkpoints.by_age(tmp_path)] == ["8", "7", "5", "3", "1"]


def test_a_clock_that_is_set_back_does_not_end_the_keeping_of_one_every_so_many_hours(tmp_path):
    for step, hours in enumerate((100, 101, 1, 1.5, 2, 2.5, 3, 3.5), 1):
        written_at(save(tmp_path, step), hours)
        prune(tmp_path, keep_last=1, keep_every_hours=1)
    assert [path.name[-1] for path in checkpoints.by_age(tmp_path)] == ["8", "7", "5", "3", "2", "1"]


def test_a_kill_between_the_two_renames_of_a_save_loses_nothing(tmp_path):
    save(tmp_path, 4).rename(tmp_path / ".replaced-step-00000004")
    sweep(tmp_path)
    assert checkpoints.find_latest(tmp_path)[0].step == 4


def test_files_are_those_the_library_writes_and_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 4), "empty": torch.zeros(0), "scalar": torch.tensor(3, dtype=torch.int64),
        "half": torch.randn(5).bfloat16(), "flags": torch.tensor([True, False]),
    }  # fmt: skip
    file = tmp_path / "x.safetensors"
    checkpoint_writer.write_tensors(file, tensors)
    read = load_file(file)
    assert read.keys() == tensors.keys()
    assert all(
        torch.equal(read[name], values) and read[name].dtype == values.dtype
        for name, values in tensors.items()
    )
    said = json.loads(file.with_suffix(".json").read_text())
    assert said == {"bytes": file.stat().st_size, "xxh3_128": checkpoints._checksum(file)}


def test_every_file_is_opened_once_however_many_tensors_are_read(tmp_path, monkeypatch):
    """Opening parses the header, which for a thousand layers takes longer than all that is read."""
    slices = [(MASTER, f"layers.{n}", 0, torch.full((3,), float(n))) for n in range(50)]
    folder = save_checkpoint(tmp_path, 4, slices, {}, {f"layers.{n}": [3] for n in range(50)}, {})
    opened, real = [], checkpoints.safe_open
    monkeypatch.setattr(checkpoints, "safe_open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    found = Checkpoint(folder)
    assert [found.read(MASTER, f"layers.{n}", 1, 1).item() for n in range(50)] == list(range(50))
    assert opened == [folder / "rank-00000.safetensors"]


def test_a_file_that_cannot_be_read_is_a_damaged_one(tmp_path, monkeypatch):
    save(tmp_path, 4)
    save(tmp_path, 8)
    real, asked = checkpoints._chunks, []

    def broken_disk(file):
        asked.append(file)
        if "step-00000008" in str(file):
            raise OSError(errno.EIO, "Input/output error")
        return real(file)

    monkeypatch.setattr(checkpoints, "_chunks", broken_disk)
    monkeypatch.setattr(checkpoints.time, "sleep", lambda seconds: None)
    found, damaged = checkpoints.find_latest(tmp_path)
    assert found.step == 4 and "cannot be read (Input/output error)" in damaged[0]
    assert len([file for file in asked if "step-00000008" in str(file)]) == 3, "it is tried again"


def test_a_folder_that_a_user_keeps_is_neither_counted_nor_pruned(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001-keep")
    prune(tmp_path, keep_last=1)
    checkpoints.set_aside(tmp_path, 2)
    assert (tmp_path / "step-00000001-keep").is_dir()
    assert [path.name for path in checkpoints.by_age(tmp_path)] == []


def test_a_checkpoint_is_told_of_when_it_is_on_disk_and_an_absent_rank_is_named(tmp_path, monkeypatch):
    told = []
    writer = CheckpointWriter(tmp_path, Keep(), rank=0, world_size=2)
    writer.on_complete = lambda step: told.append((step, (tmp_path / checkpoints.step_name(step)).is_dir()))
    other = CheckpointWriter(tmp_path, Keep(), rank=1, world_size=2)
    writer.save(3, [], {}, {}, {})
    assert not writer.wait(0.3) and told == []
    other.save(3, [], {}, {}, {})
    assert writer.wait(20) and told == [(3, True)]
    monkeypatch.setattr(checkpoint_writer, "WAIT_SECONDS", 0.2)
    writer.save(5, [], {}, {}, {})
    with pytest.raises(OSError, match="nothing from rank-00001 for"):
        writer.wait(20)
    assert told == [(3, True)]
