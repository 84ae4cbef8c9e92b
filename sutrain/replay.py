"""`python -m sutrain.replay --run RUN_DIR --step N`: the documents of the batch that made update N.

Order and position are arithmetic: the configuration, the data and the position in metrics.jsonl are enough. The batch
is made anew and its fingerprint compared with the one that the run logged, so what is printed is what was trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from data_prep.config_file import ConfigError, load_config
from data_prep.shards import ShardError
from sutrain.config import PretrainConfig, batch_plan
from sutrain.data import DataError, Samples, load_manifest, word_masking
from sutrain.monitor.log import FILE_NAME, find_steps
from sutrain.pieces import PieceReader


def batch_documents(run_dir: Path, step: int) -> Iterator[dict[str, Any]]:
    """Every document piece of the global batch of update `step`, sample by sample.

    {sample, row, source, file, block, record, piece, tokens, text}. Raises ConfigError, DataError or ShardError.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; --run wants the folder of a run")
    config = load_config(PretrainConfig, path)
    if step < 1:
        raise ConfigError(f"--step {step}: steps count from 1")
    manifest = load_manifest(config.data.dir)
    masking = word_masking(manifest, config.masking, config.seed, stream="masks")
    samples = Samples(config.data.dir, "train", config.seed, masking)
    sequences = batch_plan(config, manifest.row_tokens, 1, 0).global_sequences
    first = (step - 1) * sequences
    logged = find_steps(run_dir / FILE_NAME, {step - 1, step})
    if step in logged:
        end = logged[step]["samples_consumed_total"]
        first = logged[step - 1]["samples_consumed_total"] if step - 1 in logged else end - sequences
        sequences = end - first
        fingerprint = f"{samples.batch(first, sequences).fingerprint:012x}"
        if fingerprint != logged[step]["batch_fingerprint"]:
            raise DataError(
                f"{config.data.dir}: the batch of step {step} is {fingerprint}, the run logged "
                f"{logged[step]['batch_fingerprint']}: the data is not what the run was trained on"
            )
    reader = PieceReader(config.data.dir, "train")
    specials = set(manifest.special_ids.values())
    tokenizer = sentencepiece.SentencePieceProcessor()
    tokenizer.LoadFromSerializedProto((config.data.dir / manifest.tokenizer["file"]).read_bytes())
    for sample, row in enumerate(samples.row_numbers(first, sequences), first):
        tokens_L, pieces = reader.row(int(row))
        for piece in pieces:
            ids = [int(i) for i in tokens_L[piece.start : piece.start + piece.length] if i not in specials]
            yield {
                "sample": sample,
                "row": int(row),
                "source": manifest.sources[piece.source]["name"],
                "file": manifest.files[piece.file]["path"],
                "block": piece.block,
                "record": piece.record,
                "piece": piece.piece,
                "tokens": piece.length,
                "text": tokenizer.decode(ids),
            }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the documents; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sutrain.replay", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="RUN_DIR", help="folder of the run")
    parser.add_argument("--step", required=True, type=int, metavar="N", help="the update, counted from 1")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    options = parser.parse_args(arguments)
    try:
        for document in batch_documents(options.run, options.step):
            if options.json:
                print(json.dumps(document, ensure_ascii=False))
            else:
                where = ", ".join(f"{key} {document[key]}" for key in ("row", "block", "record", "piece"))
                print(f"sample {document['sample']} · {document['source']} · {document['file']} · {where}")
                print(f"    {document['text']}")
    except BrokenPipeError:  # `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - else the interpreter complains when it ends
    except (ConfigError, DataError, ShardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
