"""Checks before the first step, so that a run that cannot work says so in seconds instead of hanging for half an hour.

Every rank looks at its own host (disk, shards, versions), all meet at a key-value store at MASTER_ADDR:MASTER_PORT, put
down what they found, and read what the others put down. Who does not come within the time limit is named by rank, who
differs by rank, host and value. Only then the process group is made, and a small all-reduce must end in time as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
import torch.distributed as dist

from data_prep.config_file import ConfigError
from data_prep.shards import Manifest, index_name
from sutrain import heartbeat
from sutrain.config import PretrainConfig
from sutrain.data import remote_of
from sutrain.launch import hold_run_folder
from sutrain.models.configuration import parameter_count
from sutrain.optim.build import whole_state_tensors
from sutrain.remote import Remote

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "zstandard", "xxhash")


class PreflightError(ValueError):
    """Something that a user has to mend; one line for each finding, the same on every rank."""


class PreflightTimeoutError(TimeoutError):
    """A rank did not come, or a collective did not end in time: the network, or a host that is down."""


def join(
    config: PretrainConfig, manifest: Manifest, device: torch.device, rank: int, world_size: int
) -> TextIO | None:
    """All checks; afterwards there is a process group, and this rank's heart beats. Returns rank 0's hold on run_dir.

    Raises PreflightError or PreflightTimeoutError.
    """
    tensors = 1 + whole_state_tensors(config.optimizer.name, config.optimizer.settings)  # and the masters
    needed = 2 * 4 * parameter_count(config.model) * tensors
    findings = local_findings(config.run_dir, needed, manifest, rank, world_size, remote_of(config.data))
    lock = None
    if rank == 0:
        try:
            lock = hold_run_folder(config.run_dir)
        except (ConfigError, OSError) as error:
            findings.append(str(error))
    facts = facts_of_this_rank({"configuration": config.model_dump_json(), "data": manifest.content_hash})
    store = meet(config.start_timeout_seconds)
    compare_notes(store, rank, world_size, findings, facts, config.start_timeout_seconds)
    heartbeat.start(config.run_dir, rank)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl", store=store, rank=rank, world_size=world_size
    )
    check_collectives(store, rank, world_size, device, config.start_timeout_seconds)
    return lock


def local_findings(
    run_dir: Path,
    needed_bytes: int,
    manifest: Manifest,
    rank: int,
    world_size: int,
    remote: Remote | None = None,
) -> list[str]:
    """What is wrong on this host: room for two checkpoints, a run folder to write to, shards as the manifest says.

    Each rank looks at its share of the shards, at most 200 of them, so that a large data set costs nothing.
    """
    findings = []
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".preflight-{rank}"
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(run_dir).free
        if free < needed_bytes:
            findings.append(
                f"run_dir {run_dir}: {_mb(free)} free, a checkpoint and the one before it take {_mb(needed_bytes)}"
            )
    except OSError as error:
        findings.append(f"run_dir {run_dir}: cannot be written ({error.strerror})")
    for split, entry in manifest.splits.items():
        folder = Path(manifest.directory) / split
        for shard in entry.shards[rank::world_size][:200]:
            file = folder / shard.name
            if remote is not None and split == "train":
                size = remote.size(split, shard.name)
            else:
                size = file.stat().st_size if file.is_file() else None
                if not (folder / index_name(shard.name)).is_file():
                    findings.append(f"{folder / index_name(shard.name)}: missing")
            if size != shard.file_bytes:
                found = "missing" if size is None else f"{size} bytes"
                findings.append(f"{file}: {found}, expected {shard.file_bytes} bytes")
    return findings


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
                  seconds: float) -> None:  # fmt: skip
    """Put down what this rank found, read what the others did.

    Raises PreflightTimeoutError naming the ranks that did not come, PreflightError with every finding and difference.
    """
    note = {
        "host": socket.gethostname(),
        "interface": interface_to(os.environ["MASTER_ADDR"]),
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


def check_collectives(
    store: dist.Store, rank: int, world_size: int, device: torch.device, seconds: float
) -> None:
    """One small all-reduce must end in time and give the right sum.

    Raises PreflightTimeoutError naming the ranks for which it did not, with host and interface.
    """
    values = torch.full((1024,), float(rank + 1), device=device)
    ours = f"rank {rank} on {socket.gethostname()} ({interface_to(os.environ['MASTER_ADDR'])})"
    store.set(f"collective/begun/{rank}", ours)
    work = dist.all_reduce(values, async_op=True)
    deadline = time.monotonic() + seconds
    assert work is not None
    try:
        while not work.is_completed() and time.monotonic() < deadline:
            time.sleep(0.01)
        done = work.is_completed()
        if done:
            work.wait()
    except RuntimeError as error:
        raise PreflightTimeoutError(
            f"{ours}: the first all-reduce failed: {' '.join(str(error).split())[:300]}"
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
        f"{ours}: the first all-reduce did not end within {seconds:.0f} s; {whom}. Set GLOO_SOCKET_IFNAME or "
        "NCCL_SOCKET_IFNAME to the interface that connects the hosts"
    )


def interface_to(address: str) -> str:
    """Name and address of the network interface over which this host reaches `address`."""
    chosen = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        return f"interface {chosen}, as set"
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing; asks the routing table
            own = probe.getsockname()[0]
    except OSError:
        return "no route"
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            return f"interface {name}, {own}"
    return own


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
