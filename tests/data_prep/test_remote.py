"""Input from and output to S3 (a moto server): the same content as on disk, whole or not there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from data_prep import text
from data_prep.config import CorpusSection, PrepareConfig
from data_prep.errors import DataPrepError
from data_prep.inputs import list_corpus
from data_prep.places import is_remote, place
from data_prep.plan import make_plan
from data_prep.sources import read_batches
from tests.data_prep.made import command_line, make_texts, prepare, settings, write_jsonl

BUCKET = "s3://corpora"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The end point of an S3 server with an empty bucket, told to this process and its children."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path_factory.mktemp("moto") / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            import s3fs

            system = s3fs.S3FileSystem()
            for _ in range(300):
                try:
                    system.mkdir("corpora")
                    break
                except Exception:  # which one it is depends on how far the server has come
                    time.sleep(0.1)
            else:
                process.kill()
                pytest.fail("the S3 server did not answer within its time")
            try:
                yield system
            finally:
                process.kill()
                process.wait()


def upload(system, folder: Path, target: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            system.pipe_file(f"{target}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def objects(system, folder: str) -> dict[str, bytes]:
    system.invalidate_cache()
    return {name.removeprefix(f"{folder}/"): system.cat_file(name) for name in system.find(folder)}


def test_s3_in_and_out_give_the_content_of_files(s3, corpus, prepared, tmp_path):
    upload(s3, corpus, "corpora/raw")
    tree = settings(
        Path("unused"),
        [f"{BUCKET}/raw"],
        work_dir=str(tmp_path / "work"),
        resources={"workers": 2, "task_bytes": 1},
    )
    tree["output_dir"] = f"{BUCKET}/prepared"
    done = command_line(tree, tmp_path, "run")
    assert done.returncode == 0, done.stderr
    found = objects(s3, "corpora/prepared")
    names = ["token_counts.bin", "quarantine.jsonl", "manifest.json", "tokenizer/tokenizer.model"]
    names += [str(path.relative_to(prepared)) for path in prepared.glob("*/shard-*")]
    for name in names:
        assert found[name] == (prepared / name).read_bytes(), name
    assert not [name for name in found if ".tmp-" in name]
    assert not list((tmp_path / "work").glob(".sutrain-*")), "intermediate files are removed"

    shard = bytearray(found["train/shard-000001.tar"])
    shard[len(shard) // 3] ^= 1
    s3.pipe_file("corpora/prepared/train/shard-000001.tar", bytes(shard))
    damaged = command_line(tree, tmp_path, "verify")
    assert damaged.returncode == 4 and "shard-000001.tar: damaged" in damaged.stderr
    fresh = command_line(tree, tmp_path, "run", "--fresh")
    assert fresh.returncode == 0, fresh.stderr
    assert objects(s3, "corpora/prepared")["manifest.json"] == found["manifest.json"]
    s3.rm("corpora/prepared/train/shard-000001.tar")
    gone = command_line(tree, tmp_path, "run")
    assert gone.returncode == 4 and "train/shard-000001.tar is gone" in gone.stderr


def test_parts_of_text_go_to_s3_whatever_their_size(s3, tmp_path, monkeypatch):
    """What the disk of a local part is asked now and then, an object cannot be asked."""
    monkeypatch.setattr(text._EarlyWriteBack.__init__, "__defaults__", (1024**2,))
    line = "".join(make_texts(40))[:999] + "\n"
    (tmp_path / "a.txt").write_text("".join(f"{number:07d} {line}" for number in range(1500)))
    tree = settings(Path("unused"), [tmp_path / "a.txt"], work_dir=str(tmp_path / "work"))
    tree["output_dir"] = f"{BUCKET}/text"
    tree["shards"] |= {
        "content": "text",
        "compress_text": False,
        "validation_share": 0,
        "target_bytes": 10**8,
    }
    manifest = prepare(tree)
    assert (
        manifest.splits["train"].documents == 1500 and manifest.splits["train"].shards[0].file_bytes > 2**20
    )
    assert command_line(tree, tmp_path, "verify").returncode == 0


def test_a_url_that_holds_something_else_is_refused(s3, tmp_path):
    s3.pipe_file("corpora/others/manifest.json", b"{}")
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    tree = settings(Path("unused"), [source], work_dir=str(tmp_path / "work")) | {
        "output_dir": f"{BUCKET}/others"
    }
    for arguments in (("run",), ("run", "--fresh")):
        refused = command_line(tree, tmp_path, *arguments)
        assert refused.returncode == 2 and "which no run with this work_dir wrote" in refused.stderr
    assert objects(s3, "corpora/others") == {"manifest.json": b"{}"}


@pytest.mark.parametrize("command", ["plan", "run", "verify"])
def test_an_output_out_of_reach_is_one_clear_line(tmp_path, monkeypatch, command):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    tree = settings(Path("unused"), [source], work_dir=str(tmp_path / "work"))
    result = command_line(tree | {"output_dir": f"{BUCKET}/out"}, tmp_path, command)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: output_dir: {BUCKET}/out: cannot be reached (NoCredentialsError: " in result.stderr


@pytest.mark.parametrize(
    ("output", "path", "apart"),
    [
        ("memory://lake/out", "memory://lake/raw", True),
        ("memory://lake/raw/out", "memory://lake/raw", False),
        ("memory://lake/raw/out", "memory://lake/raw/**/*.jsonl", False),
        ("memory://lake/raw", "memory://lake/raw/a.jsonl", False),
        ("memory://lake", "memory://lake/raw/*.jsonl", False),
        ("memory://lake/rawer", "memory://lake/raw", True),
    ],
)
def test_input_and_output_far_away_must_lie_apart(tmp_path, monkeypatch, output, path, apart):
    """A work_dir of '.' is far from all of them."""
    fsspec.filesystem("memory").pipe_file("/lake/raw/a.jsonl", b'{"text": "one"}\n')
    monkeypatch.chdir(tmp_path)
    tree = settings(Path("x"), [path], work_dir=".") | {"output_dir": output}
    if apart:
        assert [file.relative for file in make_plan(PrepareConfig.model_validate(tree)).files] == ["a.jsonl"]
    else:
        with pytest.raises(
            DataPrepError, match="^output_dir: memory:.* lie in one another; take a folder apart$"
        ):
            make_plan(PrepareConfig.model_validate(tree))


@pytest.fixture
def web(tmp_path):
    """The URL of a web server for tmp_path/web."""
    (tmp_path / "web").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_of_a_web_server_are_input(web, tmp_path):
    write_jsonl(tmp_path / "web" / "raw" / "a.jsonl", make_texts(30))
    for path, root, name in (
        (f"{web}/raw/a.jsonl", None, "a.jsonl"),
        (f"{web}/raw/", None, "a.jsonl"),
        (f"{web}/raw/a.jsonl", web, "raw/a.jsonl"),
        ("memory://copy/raw/a.jsonl", "memory://copy", "raw/a.jsonl"),
    ):
        fsspec.filesystem("memory").pipe_file(
            "/copy/raw/a.jsonl", (tmp_path / "web/raw/a.jsonl").read_bytes()
        )
        files, _, problems = list_corpus(0, CorpusSection(name="x", paths=[path], root=root))
        assert ([file.relative for file in files], problems) == ([name], [])
        (batch,) = read_batches(files[0], 0, None, 1000)
        assert len(batch.lines) == 30


def test_what_is_not_there_is_one_clear_line(s3, tmp_path):
    tree = settings(
        tmp_path / "out", [f"{BUCKET}/nothing/*.jsonl", "s3://no-such-bucket/x.jsonl", "nowhere://x/y.txt"]
    )
    result = command_line(tree, tmp_path, "plan")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "nothing/*.jsonl: no such file" in result.stderr and "no-such-bucket/x.jsonl" in result.stderr
    assert "nowhere://x/y.txt: this storage cannot be used" in result.stderr
    far = settings(Path("x"), [tmp_path]) | {"output_dir": f"{BUCKET}/out"}
    result = command_line(far, tmp_path, "plan")
    assert result.returncode == 2 and "work_dir: required with the URL" in result.stderr


def test_globs_roots_and_changed_objects(s3, tmp_path):
    upload(
        s3, Path(write_jsonl(tmp_path / "up" / "x" / "a.jsonl", make_texts(300))).parents[1], "corpora/globs"
    )
    s3.pipe_file("corpora/globs/x/.hidden.jsonl", b"{}")
    for path, root, name in (
        (f"{BUCKET}/globs/*/a.jsonl", None, "x/a.jsonl"),
        (f"{BUCKET}/globs/**/*.jsonl", None, "x/a.jsonl"),
        (f"{BUCKET}/globs/x/a.jsonl", None, "a.jsonl"),
        (f"{BUCKET}/globs/x", f"{BUCKET}/globs", "x/a.jsonl"),
    ):
        files, _, problems = list_corpus(0, CorpusSection(name="x", paths=[path], root=root))
        assert ([file.relative for file in files], problems) == ([name], [])
    s3.pipe_file("corpora/globs/x/a.jsonl", b'{"text": "other"}\n' * 4)
    (batch,) = read_batches(files[0], 0, None, 1000)
    assert batch.lines == ["file_changed"]


def test_places():
    assert is_remote("s3://bucket/x") and is_remote("memory://x") and not is_remote("file:///tmp/x")
    assert not is_remote("/tmp/x") and not is_remote("C:x") and place("file:///tmp/x") == Path("/tmp/x")
    config = settings(Path("/x"), ["/y"], work_dir="file:///tmp/z")
    assert PrepareConfig.model_validate(config).work_base == Path("/tmp/z")
    assert place("~/x") == Path.home().resolve() / "x" and os.fspath(place("/tmp/../tmp/x")) == "/tmp/x"
