"""Our loader against webdataset, litdata, torchdata and datasets on the same tokens; start, resume, the cost of a save.

    pip install --no-deps --target build/peers litdata torchdata datasets dill multiprocess pandas \
        lightning-utilities tifffile boto3 botocore s3transfer jmespath
    python benchmarks/loader.py [--rows 524288] [--rounds 5]

Every loader delivers batches of 32 rows of 512 tokens as int64 tensors, in order. The rounds are interleaved, so that
noise meets all; a value is the median. `read` is the tokens alone, which is all that the peers do; `masked` is the
whole job of ours (word starts, documents, whole-word masks, fingerprint), with the same masking function behind each
peer. Warm: the files are read once before every measurement, since what nobody touched for a while is slow even in
memory (of a virtual machine). Cold: their pages are given back to the system first. Position to resume: the middle of
the first epoch. Behind the first batch every loader has a second, as a first step takes, in which its processes come
up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "build/peers")]

from benchmarks.loader_peers import (  # noqa: E402
    BATCH,
    SHARD_ROWS,
    L,
    datasets_loader,
    litdata_loader,
    torchdata_loader,
    webdataset_loader,
)  # fmt: skip
from benchmarks.loader_tokens import Tokens  # noqa: E402
from benchmarks.results import write_results  # noqa: E402
from data_prep.shards import (  # noqa: E402
    SPECIAL_IDS,
    Block,
    Manifest,
    ShardEntry,
    ShardWriter,
    SplitEntry,
    index_name,
    shard_name,
    token_dtype,
)  # fmt: skip
from sutrain import prefetch as prefetch_module  # noqa: E402
from sutrain.batch_plan import BatchPlan  # noqa: E402
from sutrain.checkpoint import MASTER  # noqa: E402
from sutrain.checkpoint_writer import CheckpointWriter, Keep  # noqa: E402
from sutrain.config import Masking  # noqa: E402
from sutrain.data import Samples, load_manifest  # noqa: E402
from sutrain.labelling import word_masking  # noqa: E402
from sutrain.launch import environment  # noqa: E402
from sutrain.prefetch import prefetch  # noqa: E402

DEVICE = torch.device("cpu")
V, BLOCK, LONGEST_SECONDS, PAUSE_SECONDS = 12_000, 256, 2.0, 1.0
OUTPUT = ROOT / "benchmarks/results/loader.json"


def write_shards(folder: Path, rows: int) -> np.ndarray:
    """A data set of `rows` random rows in our format (three documents a row); returns the tokens, uint16 [rows, L]."""
    random = np.random.default_rng(0)
    tokens_NL = (np.minimum(random.zipf(1.3, (rows, L)), V - 6) + 5).astype(np.uint16)
    splits = {}
    for split, count in (("train", rows), ("validation", 512)):
        (folder / split).mkdir(parents=True)
        entries = []
        for number, first in enumerate(range(0, count, SHARD_ROWS)):
            in_shard = min(SHARD_ROWS, count - first)
            with open(folder / split / shard_name(number), "wb") as file:
                writer = ShardWriter(file, split, number, token_dtype(V), 3)
                for start in range(first, first + in_shard, BLOCK):
                    stop = min(start + BLOCK, first + in_shard)
                    pieces = [
                        (row, at, length, 0, 0, 0, row, 0)
                        for row in range(stop - start)
                        for at, length in ((0, 200), (200, 100), (300, 212))
                    ]
                    bits = np.packbits(random.random((stop - start, L)) < 0.6)
                    writer.add(Block(tokens_NL[start:stop], bits, np.array(pieces, np.uint32).T.copy()))
                index, hashes = writer.finish()
            (folder / split / index_name(shard_name(number))).write_bytes(index)
            entries.append(ShardEntry(shard_name(number), in_shard, 3 * in_shard, in_shard * L, **hashes))
        splits[split] = SplitEntry(count, 3 * count, count * L, "0", entries)
    counts = np.ones(V, "<u8").tobytes()
    (folder / "token_counts.bin").write_bytes(counts)
    known = {
        "seed": 0, "row_tokens": L, "block_rows": BLOCK, "vocab_size": V, "special_ids": SPECIAL_IDS, "has_words": True,
        "tokenizer": {"file": ""}, "splits": splits, "sources": [{"name": "random"}], "files": [], "records": {},
        "token_counts": {"file": "token_counts.bin", "xxh3": xxhash.xxh3_128_hexdigest(counts)}, "tools": {},
        "config": {"shards": {}},
    }  # fmt: skip
    manifest = Manifest(**known)
    (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return tokens_NL


def ours(folder: Path, masked: bool) -> Callable[[int, int], Iterator[Any]]:
    def loader(workers: int, position: int) -> Iterator[Any]:
        samples = Samples(folder, "train", 0, word_masking(load_manifest(folder), Masking(), 0, "masks"))
        source: Any = samples if masked else Tokens(samples)
        for batches in prefetch(source, BatchPlan(BATCH, BATCH, 1, 0), position, 10**6, 4, workers):
            yield batches[0].on(DEVICE)["tokens_BL"] if masked else batches[0]

    return loader


def touch(path: Path) -> None:
    """Read a file, or all files below a folder, once."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 20):
                    pass


def give_back_pages(folder: Path) -> None:
    """Let the system forget the content of all files below a folder (what is written to disk)."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def rate(
    loader: Callable[[int, int], Iterator[Any]], workers: int, samples: int, mask: Any = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:  # fmt: skip
    """Samples a second from the first batch on, over so many samples or `LONGEST_SECONDS`, whatever ends first.

    With clock=time.process_time and no workers: of processor time, which does not depend on what else the machine does.
    """
    batches = loader(workers, 0)
    next(batches)
    if workers:
        time.sleep(PAUSE_SECONDS)
    began, started, count = time.perf_counter(), clock(), 0
    for batch in batches:
        if mask is not None:
            mask(batch.numpy(), count)
        count += len(batch)
        if count >= samples or time.perf_counter() - began > LONGEST_SECONDS:
            break
    return count / (clock() - started)


def first_batch(
    loader: Callable[[int, int], Iterator[Any]], workers: int, position: int
) -> tuple[float, Any]:
    started = time.perf_counter()
    batch = next(loader(workers, position))
    return time.perf_counter() - started, batch


def save_costs(folder: Path, rounds: int = 9) -> dict[str, float]:
    """What a save holds up, in memory copies of the same state, how much slower steps of one thread are while it is
    written (a core is left to the writer), and how far memory rises above the state at most."""
    torch.set_num_threads(1)
    state = [torch.randn(4_000_000) for _ in range(24)]  # 384 MB, as the masters of 96 million parameters
    copy = [values.clone() for values in state]  # touched: not part of the peak below
    writer = CheckpointWriter(folder, Keep(last=1))
    matrix = torch.randn(384, 384)

    def step() -> float:
        started = time.perf_counter()
        for _ in range(100):
            matrix @ matrix
        return time.perf_counter() - started

    def save(number: int) -> float:
        slices = [(MASTER, f"layer {i}", 0, values) for i, values in enumerate(state)]
        started = time.perf_counter()
        writer.save(number, slices, {}, {}, {})
        return time.perf_counter() - started

    def memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    save(0)
    writer.wait()
    stalls, slowdowns, writes = [], [], []
    for number in range(1, rounds + 1):
        started = time.perf_counter()
        for target, values in zip(copy, state, strict=True):
            target.copy_(values)
        one_copy = time.perf_counter() - started
        quiet = statistics.median(step() for _ in range(15))
        stalls.append(save(number) / one_copy)
        during = []
        while not writer.wait(0):
            during.append(step())
        writes.append(writer.write_seconds)
        slowdowns.append(statistics.median(during) / quiet)
    bytes_of_state = sum(values.nbytes for values in state)
    return {
        "save_stall_vs_copy": statistics.median(stalls), "step_during_write_vs_quiet": statistics.median(slowdowns),
        "write_seconds": statistics.median(writes),
        "save_buffer_vs_state": writer.buffer_bytes / bytes_of_state,
        "save_peak_memory_vs_state": (memory("VmHWM") - before) / bytes_of_state,
    }  # fmt: skip


def step_beside_reading(data: Path, rounds: int, steps: int = 40, rows: int = 64) -> float:
    """How much longer a step takes that only hands small operations to torch, 20,000 of them, while a process reads
    and masks `rows` rows a step: threads of the loop's process would wait for the same lock of Python's."""
    torch.set_num_threads(1)
    prefetch_module._MOST_OWN = (
        0  # what the loop reads in the place of waiting would not be read beside the step
    )
    values = [torch.randn(8, 8) for _ in range(50)]

    def step() -> float:
        started = time.perf_counter()
        for _ in range(400):
            for value in values:
                value.add_(1.0)
        return time.perf_counter() - started

    ratios = []
    for _ in range(rounds):
        samples = Samples(data, "train", 0, word_masking(load_manifest(data), Masking(), 0, "masks"))
        batches = prefetch(samples, BatchPlan(rows, rows, 1, 0), 0, 10**6, 2, 1)
        next(batches)
        time.sleep(PAUSE_SECONDS)
        beside, alone = [], []
        for _ in range(steps):
            next(batches)
            beside.append(step())
            time.sleep(0.05)  # what is read ahead is there now
            step()  # the first one behind a pause is slow
            alone.append(step())
        batches.close()
        ratios.append(statistics.fmean(beside) / statistics.fmean(alone))  # a stretch is read every few steps
    return statistics.median(ratios)


def wait_share(data: Path, folder: Path) -> float:
    """Share of the steps that a real training on one rank waits for data, from its own log, without the first steps."""
    model = {"vocab_size": V, "hidden_size": 128, "num_layers": 2, "num_heads": 2, "head_size": 64}
    tree = {
        "run_dir": str(folder), "steps": 30, "data": {"dir": str(data)},
        "model": model | {"feed_forward_size": 512, "max_row_tokens": L},
        "batch": {"global_sequences": 16, "micro_sequences": 8}, "optimizer": {"learning_rate": 0.01},
        "evaluation": {"every_steps": 100, "sequences": 8}, "monitor": {"port": 0, "probe_every_steps": 0},
    }  # fmt: skip
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "sutrain/pretrain.py", "--config", str(config)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    steps = [record for record in records if record["kind"] == "step" and record["step"] > 3]
    return sum(step["data_wait_seconds"] for step in steps) / sum(step["step_seconds"] for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=524_288)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="loader-benchmark-"))
    try:
        results = measure(scratch, options.rows, options.rounds)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    facts = environment(1)
    machine = {key: facts[key] for key in ("processor", "cores", "python", "packages")}
    command = f"python benchmarks/loader.py --rows {options.rows} --rounds {options.rounds}"
    content = {"commit": commit, "machine": machine, "command": command, "results": results}
    write_results(options.output, content)


def measure(scratch: Path, rows: int, rounds: int) -> list[dict[str, Any]]:
    """All measurements, printed as a table; the results as benchmarks/results has them."""
    data, file = scratch / "data", scratch / "tokens.npy"
    tokens_NL = write_shards(data, rows)
    np.save(file, tokens_NL)
    peers = {
        "webdataset": webdataset_loader(data), "litdata": litdata_loader(scratch / "litdata", file, rows),
        "torchdata": torchdata_loader(file), "datasets": datasets_loader(scratch / "datasets", tokens_NL),
    }  # fmt: skip
    loaders = {"sutrain": ours(data, masked=False), **peers}
    middle = rows // 2 // BATCH * BATCH
    for name, loader in loaders.items():
        for position in (0, middle):
            got = first_batch(loader, 0, position)[1]
            assert (got.numpy() == tokens_NL[position : position + BATCH]).all(), (
                f"{name} delivers other tokens"
            )

    masking = word_masking(load_manifest(data), Masking(whole_words=False), 0, "masks")
    masked = {"sutrain": ours(data, masked=True), **peers}
    found: dict[tuple[str, ...], list[float]] = {}
    samples = rows - 2 * BATCH  # the first batch is not counted
    files = {"litdata": scratch / "litdata", "torchdata": file, "datasets": scratch / "datasets"}
    for _ in range(rounds):
        for workers in (0, 1, 2):
            for name, loader in loaders.items():
                touch(files.get(name, data))
                found.setdefault(("read", name, str(workers)), []).append(rate(loader, workers, samples))
                touch(files.get(name, data))
                mask = None if name == "sutrain" else (lambda batch, at: masking(batch, None, at))
                value = rate(masked[name], workers, samples, mask)
                found.setdefault(("masked", name, str(workers)), []).append(value)
        for name, loader in loaders.items():
            touch(files.get(name, data))
            found.setdefault(("processor", name, "0"), []).append(
                rate(loader, 0, samples, clock=time.process_time)
            )
            give_back_pages(scratch)
            found.setdefault(("cold", name, "1"), []).append(rate(loader, 1, samples))
            for what, position in (("start", 0), ("resume", middle)):
                found.setdefault((what, name, "1"), []).append(first_batch(loader, 1, position)[0])
    medians = {key: statistics.median(values) for key, values in found.items()}
    print(f"{'':<12}" + "".join(f"{f'{what} {w}':>12}" for what in ("read", "masked") for w in (0, 1, 2))
          + f"{'cold 1':>12}{'cpu 0':>12}{'start s':>12}{'resume s':>12}")  # fmt: skip
    for name in loaders:
        keys = [(what, name, str(w)) for what in ("read", "masked") for w in (0, 1, 2)]
        line = "".join(
            f"{medians[key]:>12,.0f}" for key in [*keys, ("cold", name, "1"), ("processor", name, "0")]
        )
        print(f"{name:<12}{line}{medians['start', name, '1']:>12.3f}{medians['resume', name, '1']:>12.3f}")

    def best(what: str, names: list[str]) -> float:
        return max(value for key, value in medians.items() if key[0] == what and key[1] in names)

    epochs = max(
        first_batch(loaders["sutrain"], 1, position)[0] for position in (middle, 7 * rows + 11, 10**9)
    )
    values = [
        ("resume_seconds", max(epochs, medians["resume", "sutrain", "1"]), "s", 1.0, "lower"),
        ("samples_vs_best_peer", best("read", ["sutrain"]) / best("read", list(peers)), "ratio", 2.0, "higher"),
        ("masked_samples_vs_best_peer", best("masked", ["sutrain"]) / best("masked", list(peers)), "ratio", None,
        "higher"),
        (
            "processor_samples_vs_best_peer",
            best("processor", ["sutrain"]) / best("processor", list(peers)), "ratio", None, "higher",
        ),
        ("cold_samples_vs_best_peer", best("cold", ["sutrain"]) / best("cold", list(peers)), "ratio", None, "higher"),
        ("step_beside_reading_vs_alone", step_beside_reading(data, rounds), "ratio", None, "lower"),
        ("wait_share", wait_share(data, scratch / "run"), "ratio", 0.01, "lower"),
    ]  # fmt: skip
    goals = {"save_stall_vs_copy": 1.5, "step_during_write_vs_quiet": 1.1}
    costs = save_costs(scratch / "checkpoints")
    values += [(name, value, "s" if name.endswith("seconds") else "ratio", goals.get(name), "lower")
               for name, value in costs.items()]  # fmt: skip
    for name, value, unit, goal, _ in values:
        print(f"{name:<32}{value:>10.3f} {unit:<6}" + (f"goal {goal}" if goal is not None else ""))
    keys = ("name", "value", "unit", "goal", "better")
    return [dict(zip(keys, (v[0], round(v[1], 4), *v[2:]), strict=True)) for v in values] + [
        {"name": " ".join(key), "value": round(value, 4), "unit": "s" if key[0] in ("start", "resume") else "samples/s",
         "goal": None, "better": None} for key, value in medians.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
