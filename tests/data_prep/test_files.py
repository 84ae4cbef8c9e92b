"""Files are whole or absent, and a full disk is one clear line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import DataPrepError, DiskFullError
from data_prep.files import (
    atomic_file,
    disk_errors,
    free_bytes,
    read_json,
    write_array,
    write_json,
    write_speed,
)


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert list((tmp_path / "deep").iterdir()) == []
    with atomic_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and len(list(path.parent.iterdir())) == 1


def test_a_full_disk_says_what_to_do(tmp_path):
    with pytest.raises(DiskFullError, match="make room, then run the same command again") as raised:
        with disk_errors(tmp_path / "file"), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    assert raised.value.exit_code == 3


def test_an_unwritable_place_and_damaged_json_are_one_line(tmp_path):
    with pytest.raises(DataPrepError, match="cannot be written"):
        write_json(Path("/proc/nothing/file"), {})
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataPrepError, match=r"a\.json: cannot be read as JSON"):
        read_json(tmp_path / "a.json")
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_the_probe_of_a_disk_has_no_name_that_a_killed_run_could_leave(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        os, "fsync", lambda file: seen.append((list(tmp_path.iterdir()), os.fstat(file).st_size))
    )
    assert write_speed(tmp_path / "not yet there", 2**20) > 0
    assert seen == [([], 2**20)]


@pytest.mark.parametrize("numbers", [60, 504, 512, 4000])
def test_an_array_is_on_a_full_disk_whole_or_not_at_all(small_disk, numbers):
    """Numbers of 8 bytes, of which a page has room for 496 behind the header."""
    folder, resize = small_disk
    resize("64k")
    (folder / "others").write_bytes(bytes(60 * 1024))
    if numbers == 60:
        with atomic_file(folder / "a.npy", sync=False) as file:
            write_array(file, np.arange(numbers, dtype=np.uint64))
        assert np.load(folder / "a.npy").tolist() == list(range(numbers))
        return
    with pytest.raises(DiskFullError), atomic_file(folder / "a.npy", sync=False) as file:
        write_array(file, np.arange(numbers, dtype=np.uint64))
    assert [path.name for path in folder.iterdir()] == ["others"]
