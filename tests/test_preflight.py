"""Checks at the start: real processes that meet, or do not; every failure in seconds, in one message with names."""

import dataclasses
import json
import shutil
import socket
import time
from types import SimpleNamespace

from sutrain import preflight
from sutrain.data import load_manifest
from sutrain.network import interface_to
from sutrain.preflight import folder_findings, shard_findings
from tests import warm

# A rank that does what pretrain.py does first. Faults are put in here, from outside.
RANK = """
import json, os, pathlib, sys, time
import torch, torch.distributed as dist
from sutrain import heartbeat, launch, preflight

options = json.loads(sys.argv[1])
rank, world_size, limit = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), options["limit"]
try:
    store = preflight.meet(limit)
    facts = preflight.facts_of_this_rank({}) | options.get("facts", {})
    findings = options.get("findings", [])
    if "run_dir" in options:
        preflight._SEEN_WITHIN_SECONDS = 1.0
        findings += preflight.sharing_findings(store, pathlib.Path(options["run_dir"]), rank, limit)
    preflight.compare_notes(store, rank, world_size, findings, facts, limit)
    if "fails" in options:
        store.set("group/failed", "rank 0 on far")
        time.sleep(60)
    if "marks" in options:
        os.environ[heartbeat.MARK] = options["marks"]
        print("obeys", *sorted(preflight.supervisors(store, rank)), flush=True)
    if options.get("absent"):
        time.sleep(60)
    preflight.make_group(store, rank, world_size, torch.device("cpu"), limit)
    if options.get("asleep"):
        time.sleep(60)
    preflight.check_collectives(store, rank, world_size, torch.device("cpu"), limit)
    print("ready")
except preflight.PreflightTimeoutError as error:
    launch.stop(str(error), on_every_rank=True, at_once=True)
except preflight.PreflightError as error:
    print(f"PreflightError: {error}")
"""


def start(options):
    """One process for each entry of `options` that is not None; the world has as many ranks as entries."""
    port = warm.free_port()
    ranks = []
    for rank, option in enumerate(options):
        if option is None:
            continue
        where = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(options),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        variables = {key: str(value) for key, value in where.items()} | option.get("variables", {})
        ranks.append(warm.start("-c", RANK, json.dumps({"limit": 30, **option}), variables=variables))
    return ranks


def outputs(ranks, of=None):
    """What the ranks (or the first `of`) printed; the others are ended."""
    try:
        return [process.communicate(timeout=90)[0] for process in ranks[:of]]
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_ranks_that_agree_are_ready():
    assert [output.strip().splitlines()[-1] for output in outputs(start([{}, {}]))] == ["ready", "ready"]


def test_findings_and_differences_of_any_rank_are_said_on_all():
    found = outputs(start([{}, {"findings": ["/data: full"], "facts": {"torch": "1.0"}}]))
    host = socket.gethostname()
    for output in found:
        assert "PreflightError" in output and f"{host}: /data: full" in output, output
        assert f"1.0 on rank 1 ({host}); install the same everywhere" in output and "torch: 2." in output


def test_a_rank_that_does_not_come_is_named_with_who_is_there():
    started = time.monotonic()
    (output,) = outputs(start([{"limit": 2}, None]))
    assert "rank 1 did not come within 2 s" in output and f"0 on {socket.gethostname()}" in output, output
    assert interface_to("127.0.0.1") in output and "interface lo" in output
    assert time.monotonic() - started < 60


def test_rank_0_that_cannot_be_reached_is_named_with_its_address():
    (output,) = outputs(start([None, {"limit": 2}]))
    assert "rank 1 on" in output and "did not reach rank 0 at 127.0.0.1:" in output, output


def test_a_collective_that_does_not_end_names_who_did_not_begin_it():
    (output,) = outputs(start([{"limit": 3}, {"asleep": True}]), of=1)
    assert "the first all-reduce did not end within 3 s; rank 1 did not begin it" in output, output


def test_a_rank_that_does_not_join_the_group_is_named_in_time():
    started = time.monotonic()
    (output,) = outputs(start([{"limit": 3}, {"absent": True}]), of=1)
    assert "could not connect to the other ranks: rank 1 did not come" in output, output
    assert "GLOO_SOCKET_IFNAME" in output and time.monotonic() - started < 60


def test_a_rank_whose_group_another_one_could_not_make_does_not_wait_for_it():
    started = time.monotonic()
    ranks = start([{"fails": True}, {"limit": 90}])
    try:
        (output,) = outputs(ranks[1:])
    finally:
        outputs(ranks, of=0)
    assert "could not connect to the other ranks: rank 0 on far did not connect" in output, output
    assert ranks[1].returncode == 1 and time.monotonic() - started < 75, "the limit is 90 s"


def test_a_launcher_that_says_more_ranks_are_here_than_came_is_refused():
    found = outputs(start([{"variables": {"LOCAL_SIZE": "3"}}, {}]))
    host = socket.gethostname()
    for output in found:
        assert (
            f"{host}: LOCAL_SIZE (or LOCAL_WORLD_SIZE) is 3, but of the 2 ranks 2 came from there" in output
        ), output


def test_a_run_folder_that_hosts_do_not_share_is_found_before_training(tmp_path):
    (tmp_path / "other").mkdir()
    one, other = str(tmp_path), str(tmp_path / "other")
    assert "ready" in outputs(start([{"run_dir": one}, {"run_dir": one}]))[1]
    for output in outputs(start([{"run_dir": one}, {"run_dir": other}])):
        assert f"run_dir {other}: what rank 0 writes there is not seen here" in output, output


def test_ranks_obey_the_supervisors_of_rank_0_and_of_their_own_host():
    found = outputs(start([{"marks": "a"}, {"marks": "b"}]))
    assert [output.splitlines()[0] for output in found] == ["obeys a", "obeys a b"]


def test_what_is_wrong_on_this_host_is_all_found_at_once(dataset, tmp_path):
    manifest = load_manifest(dataset)
    assert folder_findings(tmp_path / "run", 1000, 0) == shard_findings(manifest, 0, 1) == []
    copied = tmp_path / "data"
    shutil.copytree(dataset, copied)
    moved = dataclasses.replace(manifest, directory=str(copied))
    (copied / "train/shard-000000.tar").write_bytes(b"short")
    (copied / "train/shard-000000.index.json").unlink()
    (copied / "validation/shard-000000.tar").unlink()
    (tmp_path / "file").write_text("")
    found = "\n".join(folder_findings(tmp_path / "run", 10**18, 0) + shard_findings(moved, 0, 1))
    assert "free, a checkpoint and the one before it take 2,000,000,000,000 MB" in found
    assert "shard-000000.tar: 5 bytes, expected" in found and "shard-000000.index.json: missing" in found
    assert "validation/shard-000000.tar: missing" in found
    assert "cannot be written" in folder_findings(tmp_path / "file/run", 1, 0)[0]
    (tmp_path / "run/checkpoints/step-00000004").mkdir(parents=True)  # one of the two is there
    assert "another checkpoint takes 1,000,000,000,000 MB" in folder_findings(tmp_path / "run", 10**18, 0)[0]


def test_each_rank_looks_at_its_share_of_the_shards(dataset, tmp_path):
    manifest = load_manifest(dataset)
    nowhere = dataclasses.replace(manifest, directory=str(tmp_path))
    whole = shard_findings(nowhere, 0, 1)
    shares = [line for rank in (0, 1) for line in shard_findings(nowhere, rank, 2)]
    assert sorted(whole) == sorted(shares) and len(whole) > 2


def test_room_is_looked_for_where_checkpoints_go_and_what_a_start_sweeps_away_is_room(tmp_path, monkeypatch):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / ".writing-step-00000008").mkdir(parents=True)
    run.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    there = elsewhere.stat().st_ino
    free = {there: 1500}

    def disk_usage(path):
        return SimpleNamespace(free=free.get(path.stat().st_ino, 0))

    monkeypatch.setattr(preflight.shutil, "disk_usage", disk_usage)
    assert f"run_dir {run / 'checkpoints'}: 0 MB free" in folder_findings(run, 1000, 0)[0]
    (elsewhere / ".writing-step-00000008/rank-00000.safetensors").write_bytes(bytes(500))
    assert folder_findings(run, 1000, 0) == []
    free[there] = 1499
    assert len(folder_findings(run, 1000, 0)) == 1
