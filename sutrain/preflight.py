"""Checks before the first step, so that a run that cannot work says so in seconds instead of hanging for half an hour.

Every rank looks at its own host (disk, shards, versions), all meet at a key-value store at MASTER_ADDR:MASTER_PORT, put
down what they found, and read what the others put down. Who does not come within the time limit is named by rank, who
differs by rank, host and value. Only then the process group is made, and a small all-reduce must end in time as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from data_prep.config_file import ConfigError
from data_prep.shards import Manifest, ShardError, index_name
from sutrain import heartbeat
from sutrain.checkpoint import by_age
from sutrain.checkpoint_writer import leftover_bytes
from sutrain.config import PretrainConfig
from sutrain.data import remote_of
from sutrain.engine import whole_state_numbers
from sutrain.launch import EXIT_FAILURE, hold_run_folder, ranks_of_this_host, stop
from sutrain.models.configuration import parameter_count
from sutrain.network import choose_interface, interface_to, own_address
from sutrain.remote import Remote

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "zstandard", "xxhash")


class PreflightError(ValueError):
    """Something that a user has to mend; one line for each finding, the same on every rank."""


class PreflightTimeoutError(TimeoutError):
    """A rank did not come, or a collective did not end in time: the network, or a host that is down."""


def join(
    config: PretrainConfig, manifests: Sequence[Manifest], device: torch.device, rank: int, world_size: int
) -> TextIO | None:
    """All checks; afterwards there is a process group, and this rank's heart beats. Returns rank 0's hold on run_dir.

    manifests: of data.dir and of each of data.others. Raises PreflightError or PreflightTimeoutError.
    """
    numbers = parameter_count(config.model) + whole_state_numbers(
        config
    )  # the masters, and what goes with them
    findings = folder_findings(config.run_dir, 4 * numbers, rank)
    for number, manifest in enumerate(manifests):
        remote = remote_of(config.data) if number == 0 else None
        findings += shard_findings(manifest, rank, world_size, remote)
    lock = None
    if rank == 0:
        try:
            lock = hold_run_folder(config.run_dir)
        except (ConfigError, OSError) as error:
            findings.append(str(error))
    hashes = [manifest.content_hash for manifest in manifests]
    facts = facts_of_this_rank({"configuration": config.model_dump_json(), "data": ", ".join(hashes)})
    limit = config.start_timeout_seconds
    store = meet(limit)
    findings += sharing_findings(store, config.run_dir, rank, limit)
    notes = compare_notes(store, rank, world_size, findings, facts, limit)
    if device.type == "cpu":
        choose_interface(list(notes.values()))
    heartbeat.start(config.run_dir, rank, supervisors(store, rank))
    make_group(store, rank, world_size, device, limit)
    check_collectives(store, rank, world_size, device, limit)
    return lock


def folder_findings(run_dir: Path, checkpoint_bytes: int, rank: int) -> list[str]:
    """What is wrong with the run folder on this host: not to be written, or no room for a checkpoint and the one
    before it, of which some may be there already."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".preflight-{rank}"
        probe.write_bytes(b"x")
        probe.unlink()
        checkpoints = run_dir / "checkpoints"  # a link to another disk, as it may be
        more = 2 - min(1, len(by_age(checkpoints)))
        disk = checkpoints if checkpoints.is_dir() else run_dir
        free = shutil.disk_usage(disk).free + leftover_bytes(checkpoints)
        needed = more * checkpoint_bytes
        if free < needed:
            what = "a checkpoint and the one before it take" if more == 2 else "another checkpoint takes"
            return [f"run_dir {disk}: {_mb(free)} free, {what} {_mb(needed)}"]
    except OSError as error:
        return [f"run_dir {run_dir}: cannot be written ({error.strerror})"]
    return []


def shard_findings(manifest: Manifest, rank: int, world_size: int, remote: Remote | None = None) -> list[str]:
    """Which shards are not as the manifest says.

    Each rank looks at its share of them, at most 200, so that a large data set costs nothing.
    """
    findings = []
    for split, entry in manifest.splits.items():
        folder = Path(manifest.directory) / split
        for shard in entry.shards[rank::world_size][:200]:
            file = folder / shard.name
            try:
                if remote is not None and split == "train":
                    size = remote.size(split, shard.name)
                else:
                    size = file.stat().st_size if file.is_file() else None
                    if not (folder / index_name(shard.name)).is_file():
                        findings.append(f"{folder / index_name(shard.name)}: missing")
            except (ShardError, OSError) as error:
                findings.append(f"{file}: cannot be looked at ({error})")
                continue
            if size != shard.file_bytes:
                found = "missing" if size is None else f"{size} bytes"
                findings.append(f"{file}: {found}, expected {shard.file_bytes} bytes")
    return findings


def sharing_findings(store: dist.Store, run_dir: Path, rank: int, seconds: float) -> list[str]:
    """Does this host see what rank 0 writes into the run folder? Checkpoints are put together there from the files
    of all ranks; on disks of their own the first one would never be complete."""
    file = run_dir / ".shared"
    if rank == 0:
        word = uuid.uuid4().hex
        with contextlib.suppress(OSError):  # a folder that cannot be written is a finding already
            file.write_text(word)
        store.set("preflight/shared", word)
        return []
    if _wait_for(store, ["preflight/shared"], seconds):
        return []  # rank 0 did not come: compare_notes says so
    word = store.get("preflight/shared").decode()
    deadline = time.monotonic() + _SEEN_WITHIN_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if file.read_text() == word:
                return []
        if time.monotonic() > deadline:
            return [
                f"run_dir {run_dir}: what rank 0 writes there is not seen here; put it on a disk that all hosts share"
            ]
        time.sleep(0.1)


_SEEN_WITHIN_SECONDS = 10.0
"""Network file systems remember for a few seconds that a file was not there."""


def supervisors(store: dist.Store, rank: int) -> set[str]:
    """The marks of the supervisors that may ask this rank to end: that of rank 0's host, and of this one."""
    own = os.environ.get(heartbeat.MARK, "")
    if rank == 0:
        store.set("preflight/supervisor", own)
    return {own, store.get("preflight/supervisor").decode()} - {""}


def make_group(store: dist.Store, rank: int, world_size: int, device: torch.device, seconds: float) -> None:
    """Make the process group, within `seconds` where making it connects the ranks (gloo); later collectives have
    torch's usual limit. Raises PreflightTimeoutError."""
    store.set(f"group/begun/{rank}", "1")
    gloo = device.type == "cpu"
    limit = timedelta(seconds=seconds) if gloo else None
    try:
        with watched(store, rank, seconds) if gloo else contextlib.nullcontext():
            dist.init_process_group(
                "gloo" if gloo else "nccl", store=store, rank=rank, world_size=world_size, timeout=limit
            )
    except RuntimeError as error:
        with contextlib.suppress(RuntimeError):
            store.set("group/failed", _this_rank(rank))
            time.sleep(2 if rank == 0 else 0)  # rank 0 holds the store: the others read why
        absent = _wait_for(store, [f"group/begun/{other}" for other in range(world_size)], 1)
        whom = f"rank {', '.join(key.rpartition('/')[2] for key in absent)} did not come; " if absent else ""
        raise PreflightTimeoutError(
            f"{_this_rank(rank)}: could not connect to the other ranks: {whom}{' '.join(str(error).split())[:300]}. "
            f"{_INTERFACE_ADVICE}"
        ) from None
    if gloo:
        dist.distributed_c10d._set_pg_timeout(dist.default_pg_timeout)


@contextlib.contextmanager
def watched(store: dist.Store, rank: int, seconds: float) -> Iterator[None]:
    """End this process when another rank could not make the group, or when making it takes much longer than `seconds`:
    gloo waits without a limit for a rank that tries to connect elsewhere."""
    own, done = store.clone(), threading.Event()  # type: ignore[attr-defined]  # the other one is in use

    def watch() -> None:
        deadline = time.monotonic() + seconds + 5
        while not done.wait(0.5):
            try:
                failed = own.get("group/failed").decode() if own.check(["group/failed"]) else ""
            except RuntimeError:
                failed = "rank 0"
            if failed or time.monotonic() > deadline:
                why = (
                    f"{failed} did not connect; its message says why" if failed else f"not in {seconds:.0f} s"
                )
                message = (
                    f"{_this_rank(rank)}: could not connect to the other ranks: {why}. {_INTERFACE_ADVICE}"
                )
                stop(message, on_every_rank=True, status=EXIT_FAILURE, at_once=True)

    threading.Thread(target=watch, name="group-watch", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def facts_of_this_rank(must_agree: Mapping[str, Any]) -> dict[str, str]:
    """Versions, our own sources and what the caller adds: must be equal on all ranks."""
    packages = {name: version(name) for name in PACKAGES}
    sources = hashlib.sha256()
    for folder in ("sutrain", "data_prep"):
        for file in sorted((Path(__file__).resolve().parents[1] / folder).rglob("*.py")):
            sources.update(file.read_bytes())
    return {
        "python": platform.python_version(), **packages, "sutrain sources": sources.hexdigest()[:12],
        **{key: str(value) for key, value in must_agree.items()},
    }  # fmt: skip


def meet(seconds: float) -> dist.Store:
    """The store of rank 0, reached within `seconds`. Raises PreflightTimeoutError naming address and interface.

    Under torchrun the agent has the store already; under DeepSpeed's launcher rank 0 opens it here.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank = int(os.environ["RANK"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    limit = timedelta(seconds=seconds)
    try:
        store: dist.Store = dist.TCPStore(
            address, port, None, is_master=rank == 0 and not agent, timeout=limit, wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        if "EADDRINUSE" in text or "address already in use" in text:
            raise
        raise PreflightTimeoutError(
            f"rank {rank} on {socket.gethostname()} ({interface_to(address)}) did not reach rank 0 at {address}:{port} "
            f"within {seconds:.0f} s: is its host up, and the port open?"
        ) from None
    if agent:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"/sutrain/attempt_{attempt}", store)
    return store


def compare_notes(store: dist.Store, rank: int, world_size: int, findings: list[str], facts: dict[str, str],
                  seconds: float) -> dict[int, dict[str, Any]]:  # fmt: skip
    """Put down what this rank found, read what the others did; the notes of all ranks.

    Raises PreflightTimeoutError naming the ranks that did not come, PreflightError with every finding and difference.
    """
    note = {
        "host": socket.gethostname(),
        "address": own_address(os.environ["MASTER_ADDR"]),
        "interface": interface_to(os.environ["MASTER_ADDR"]),
        "ranks here": ranks_of_this_host(),
        "findings": findings,
        "facts": facts,
    }
    store.set(f"preflight/{rank}", json.dumps(note))
    keys = [f"preflight/{other}" for other in range(world_size)]
    missing = _wait_for(store, keys, seconds)
    notes = {
        other: json.loads(store.get(keys[other])) for other in range(world_size) if keys[other] not in missing
    }
    if missing:
        came = ", ".join(f"{other} on {note['host']} ({note['interface']})" for other, note in notes.items())
        absent = ", ".join(key.removeprefix("preflight/") for key in missing)
        raise PreflightTimeoutError(
            f"rank {absent} did not come within {seconds:.0f} s; here are: {came}. "
            "See the log of the missing one's host, and whether it reaches MASTER_ADDR "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        )
    lines = []
    for other, note in notes.items():
        here = [one["host"] for one in notes.values()].count(note["host"])
        if note["ranks here"] > here:  # DeepSpeed would wait for the others in shared memory, for ever
            lines.append(
                f"{note['host']}: LOCAL_SIZE (or LOCAL_WORLD_SIZE) is {note['ranks here']}, but of the {world_size} "
                f"ranks {here} came from there; start it with as many ranks a host as it says"
            )
        lines += [f"{note['host']}: {finding}" for finding in note["findings"]]
        for key, value in note["facts"].items():
            if value != notes[0]["facts"].get(key):
                lines.append(
                    f"{key}: {notes[0]['facts'].get(key)} on rank 0 ({notes[0]['host']}), {value} on rank {other} "
                    f"({note['host']}); install the same everywhere"
                )
    # Rank 0 holds the store: it stays until the others have read.
    store.set(f"preflight/read/{rank}", "1")
    if rank == 0:
        _wait_for(store, [f"preflight/read/{other}" for other in range(world_size)], 5)
    if lines:
        # a shared disk that is full is one finding, not one for each rank
        raise PreflightError("\n".join(dict.fromkeys(lines)))
    return notes


def check_collectives(
    store: dist.Store, rank: int, world_size: int, device: torch.device, seconds: float
) -> None:
    """One small all-reduce must end in time and give the right sum.

    Raises PreflightTimeoutError naming the ranks for which it did not, with host and interface.
    """
    values = torch.full((1024,), float(rank + 1), device=device)
    ours = _this_rank(rank)
    store.set(f"collective/begun/{rank}", ours)
    deadline = time.monotonic() + seconds
    try:
        work = dist.all_reduce(values, async_op=True)  # where NCCL connects
        assert work is not None
        while not work.is_completed() and time.monotonic() < deadline:
            time.sleep(0.01)
        done = work.is_completed()
        if done:
            work.wait()
    except RuntimeError as error:
        raise PreflightTimeoutError(
            f"{ours}: the first all-reduce failed: {' '.join(str(error).split())[:300]}. {_INTERFACE_ADVICE}"
        ) from None
    if done:
        store.set(f"collective/ended/{rank}", "1")
        if values[0].item() != world_size * (world_size + 1) / 2:
            raise PreflightError(
                f"{ours}: an all-reduce gave {values[0].item()}, expected the sum over all ranks"
            )
        return
    ranks = range(world_size)
    absent = _wait_for(store, [f"collective/begun/{other}" for other in ranks], 1)
    stuck = _wait_for(store, [f"collective/ended/{other}" for other in ranks], 1)
    if absent:
        whom = f"rank {', '.join(key.rpartition('/')[2] for key in absent)} did not begin it"
    else:
        names = [store.get(key.replace("ended", "begun")).decode() for key in stuck]
        whom = f"it did not end for {', '.join(names)}"
    raise PreflightTimeoutError(
        f"{ours}: the first all-reduce did not end within {seconds:.0f} s; {whom}. {_INTERFACE_ADVICE}"
    )


_INTERFACE_ADVICE = "Set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface that connects the hosts"


def _this_rank(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()} ({interface_to(os.environ['MASTER_ADDR'])})"


def _wait_for(store: dist.Store, keys: list[str], seconds: float) -> list[str]:
    """The keys that nobody has set within `seconds`."""
    deadline = time.monotonic() + seconds
    missing = keys
    while missing:
        missing = [key for key in missing if not store.check([key])]
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return missing


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
