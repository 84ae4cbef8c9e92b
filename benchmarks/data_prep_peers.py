"""The other side of benchmarks/data_prep.py: what peers and bare parts do with the same text, each a program.

python benchmarks/data_prep_peers.py encode MODEL TEXT          bare sentencepiece; prints seconds, core seconds
python benchmarks/data_prep_peers.py ray TEXT OUTPUT MEMORY     Ray Data's random_shuffle, text in and out
python benchmarks/data_prep_peers.py hf-tokenizer MODEL JSON    the same unigram model for HF tokenizers
PEERS_PYTHON benchmarks/data_prep_peers.py datatrove JSONL_FOLDER OUTPUT TOKENIZER_JSON
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

_BATCH_LINES = 1000


def encode(model: str, text: str) -> None:
    """Half of the lines in each of two processes, in batches, to numpy; only the encoding is timed."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    with context.Pool(2, _keep_barrier, (start,)) as pool:
        seconds = pool.starmap(_encode_half, [(model, text, half) for half in (0, 1)], chunksize=1)
    print(f"{max(wall for wall, _ in seconds):.4f} {sum(core for _, core in seconds):.4f}")


def _keep_barrier(barrier) -> None:
    global _barrier
    _barrier = barrier


def _encode_half(model: str, text: str, half: int) -> tuple[float, float]:
    import numpy as np
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    size = os.path.getsize(text)
    with open(text, "rb") as file:
        file.seek(half * (size // 2))
        lines = file.read(size // 2).decode(errors="ignore").split("\n")
    _barrier.wait()
    started, core_started = time.perf_counter(), time.process_time()
    for first in range(0, len(lines), _BATCH_LINES):
        np.concatenate(
            processor.encode(lines[first : first + _BATCH_LINES], return_type="numpy", num_threads=1)
        )
    return time.perf_counter() - started, time.process_time() - core_started


def ray_shuffle(text: str, output: str, memory_bytes: str) -> None:
    """`read_text`, `random_shuffle`, a file of lines a block; two cores, an object store of the memory given."""
    import ray

    shutil.rmtree(output, ignore_errors=True)
    os.makedirs(output)
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=int(memory_bytes),
        include_dashboard=False,
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False

    def write(batch: dict) -> dict:
        import uuid

        with open(f"{output}/{uuid.uuid4().hex}.txt", "w", encoding="utf-8") as file:
            file.write("\n".join(batch["text"]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return {"lines": [len(batch["text"])]}

    shuffled = ray.data.read_text(text).random_shuffle(seed=1)
    print(int(shuffled.map_batches(write, batch_size=None).sum("lines")))
    ray.shutdown()


def hf_tokenizer(model: str, output: str) -> None:
    """The pieces and scores of a sentencepiece unigram model, words parted at spaces as it does."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=True)
    tokenizer.save(output)


def datatrove(source: str, output: str, tokenizer: str) -> None:
    """Read jsonl, tokenise, shuffle in each of two tasks, merge with a shuffle: what its documentation shows."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shutil.rmtree(output, ignore_errors=True)
    parts, logs = f"{output}/parts", f"{output}/logs"
    first = DocumentTokenizer(parts, tokenizer, local_working_dir=f"{output}/work", eos_token="[SEP]", seed=1)
    LocalPipelineExecutor([JsonlReader(source), first], tasks=2, workers=2, logging_dir=f"{logs}/1").run()
    merge = DocumentTokenizerMerger(parts, f"{output}/merged", save_filename="all", seed=1)
    LocalPipelineExecutor([merge], tasks=1, logging_dir=f"{logs}/2").run()
    for path in Path(output, "merged").iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


if __name__ == "__main__":
    commands = {"encode": encode, "ray": ray_shuffle, "hf-tokenizer": hf_tokenizer, "datatrove": datatrove}
    commands[sys.argv[1]](*sys.argv[2:])
