"""Shards that lie elsewhere: the same rows, by range reads, with a bounded cache, through a network that fails."""

import shutil
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.config_file import ConfigError
from data_prep.shards import ShardError, SplitReader
from sutrain import remote as remotes
from sutrain.pieces import PieceReader
from sutrain.remote import Remote, RemoteSplitReader


class Counting(MemoryFileSystem):
    """Storage in memory that counts what is fetched, and fails when told to."""

    protocol = "counting"
    store, pseudo_dirs = {}, [""]
    fetched, failures = [], 0

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("counting://").strip("/")

    def cat_file(self, path, start=None, end=None, **kwargs):
        if Counting.failures:
            Counting.failures -= 1
            raise ConnectionError("reset")
        data = super().cat_file(path, start=start, end=end, **kwargs)
        Counting.fetched.append((path, len(data)))
        return data


fsspec.register_implementation("counting", Counting, clobber=True)


@pytest.fixture(scope="module")
def url(dataset):
    files = Counting()
    for file in dataset.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            files.pipe_file(f"/bucket/{file.relative_to(dataset).as_posix()}", file.read_bytes())
    return "counting://bucket"


def open_remote(url, folder, cache_bytes=10**9):
    remote = Remote(url, folder, cache_bytes)
    remote.mirror()
    return remote


def test_rows_are_those_of_the_local_reader_and_a_block_is_fetched_once(url, dataset, tmp_path):
    local = SplitReader(dataset, "train")
    reader = RemoteSplitReader(open_remote(url, tmp_path), tmp_path, "train")
    Counting.fetched.clear()
    for start in (0, 100, 300):
        for name in ("tokens_NL", "word_start_NL", "document_NL"):
            here, there = local.rows(start, start + 90), reader.rows(start, start + 90)
            assert (getattr(here, name) == getattr(there, name)).all()
    shards = [size for path, size in Counting.fetched if path.endswith(".tar")]
    whole = sum(file.stat().st_size for file in dataset.glob("train/*.tar"))
    assert 0 < sum(shards) < whole, "ranges, not files"
    Counting.fetched.clear()
    again = RemoteSplitReader(open_remote(url, tmp_path), tmp_path, "train")
    assert (again.rows(0, 90).tokens_NL == local.rows(0, 90).tokens_NL).all()
    assert [path for path, _ in Counting.fetched] == ["/bucket/manifest.json"], "all else is there already"


def test_the_cache_stays_within_its_bound(url, tmp_path):
    bound = 12_000
    reader = RemoteSplitReader(open_remote(url, tmp_path, bound), tmp_path, "train")
    for start in range(0, len(reader) - 10, 40):
        reader.rows(start, start + 10)
        assert sum(file.stat().st_size for file in (tmp_path / ".blocks").glob("*")) <= bound
    assert list((tmp_path / ".blocks").glob("*"))


def test_all_blocks_of_the_cache_are_looked_at_now_and_then_and_the_bound_holds_for_all_ranks(
    url, tmp_path, monkeypatch
):
    """A look takes longer than it takes to fetch a block, where a hundred thousand are there."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    looks, real = [], Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: looks.append(path) or real(path))
    ranks = [open_remote(url, tmp_path, 160_000) for _ in range(4)]
    blocks = tmp_path / ".blocks"
    for number in range(800):
        ranks[number % 4].block("train", "shard-000000.tar", number, 1000)
        if number % 10 == 0:
            assert sum(file.stat().st_size for file in blocks.glob("*")) <= 160_000 + 1000
    assert sum(file.stat().st_size for file in blocks.glob("*")) > 100_000
    assert 0 < len([path for path in looks if path == blocks]) < 400


@pytest.mark.parametrize("url", ["nosuch://bucket", "gs://bucket"])
def test_a_url_that_cannot_be_read_here_is_one_clear_line(tmp_path, url, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # a storage whose package is not installed
    with pytest.raises(ConfigError, match=f"data.remote: {url}: "):
        Remote(url, tmp_path, 1000)


def test_a_network_that_fails_for_a_moment_is_asked_again(url, tmp_path, monkeypatch):
    monkeypatch.setattr(remotes, "_PAUSE_SECONDS", 0.001)
    reader = RemoteSplitReader(open_remote(url, tmp_path), tmp_path, "train")
    Counting.failures = 3
    assert len(reader.rows(0, 5).tokens_NL) == 5
    Counting.failures = 100
    with pytest.raises(ShardError, match="cannot be read after 4 attempts"):
        reader.rows(len(reader) - 5, len(reader))
    Counting.failures = 0


def test_damage_in_the_cache_is_mended_and_damage_over_there_is_named(url, tmp_path):
    remote = open_remote(url, tmp_path)
    expected = RemoteSplitReader(remote, tmp_path, "train").rows(0, 5).tokens_NL
    for file in (tmp_path / ".blocks").glob("*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(content)
    assert np.array_equal(RemoteSplitReader(remote, tmp_path, "train").rows(0, 5).tokens_NL, expected)
    files, path = Counting(), "/bucket/train/shard-000000.tar"
    intact = files.cat_file(path)
    files.pipe_file(path, intact[:600] + bytes([intact[600] ^ 255]) + intact[601:])
    shutil.rmtree(tmp_path / ".blocks")
    with pytest.raises(ShardError, match="damaged"):
        RemoteSplitReader(remote, tmp_path, "train").rows(0, 5)
    files.pipe_file(path, intact)


def test_another_data_set_at_the_same_place_replaces_what_was_kept(url, dataset, tmp_path):
    """Its shards have the same names; an old index would make every block look damaged."""
    remote = open_remote(url, tmp_path)
    expected = RemoteSplitReader(remote, tmp_path, "train").rows(0, 5).tokens_NL
    index = tmp_path / "train/shard-000000.index.json"
    index.write_text(index.read_text().replace('"first_row": 0', '"first_row": 1'))
    (tmp_path / "manifest.json").write_text("{}")  # as of an earlier preparation
    again = RemoteSplitReader(open_remote(url, tmp_path), tmp_path, "train")
    assert np.array_equal(again.rows(0, 5).tokens_NL, expected)


def test_a_size_is_asked_for_again_and_only_what_is_not_there_is_missing(url, tmp_path, monkeypatch):
    monkeypatch.setattr(remotes, "_PAUSE_SECONDS", 0.001)
    remote, real, failures = open_remote(url, tmp_path), Counting.size, [3]

    def size(self, path):
        failures[0] -= 1
        if failures[0] >= 0:
            raise ConnectionError("reset")
        return real(self, path)

    monkeypatch.setattr(Counting, "size", size)
    assert remote.size("train", "shard-000000.tar") > 0
    assert remote.size("train", "nowhere.tar") is None
    failures[0] = 100
    with pytest.raises(ShardError, match="cannot be read after 4 attempts"):
        remote.size("train", "shard-000000.tar")


def test_pieces_are_read_from_afar_too(url, dataset, tmp_path):
    remote = open_remote(url, tmp_path)
    here, there = PieceReader(dataset, "train"), PieceReader(tmp_path, "train", remote=remote)
    for row in (0, 77, 300):
        assert here.row(row)[1] == there.row(row)[1] and (here.row(row)[0] == there.row(row)[0]).all()


def test_a_data_set_prepared_here_is_never_overwritten_and_an_empty_folder_is_taken(url, dataset, tmp_path):
    prepared = tmp_path / "prepared"
    shutil.copytree(dataset, prepared)
    (prepared / "manifest.json").write_text("{}")  # another one than lies over there
    before = {file: file.read_bytes() for file in prepared.rglob("*") if file.is_file()}
    with pytest.raises(
        ConfigError, match="data.dir: .*prepared holds files that data.remote did not put there"
    ):
        open_remote(url, prepared)
    assert {file: file.read_bytes() for file in prepared.rglob("*") if file.is_file()} == before
    (tmp_path / "empty").mkdir()
    assert len(RemoteSplitReader(open_remote(url, tmp_path / "empty"), tmp_path / "empty", "train"))
