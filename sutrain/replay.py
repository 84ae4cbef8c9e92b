"""`python -m sutrain.replay --run RUN_DIR --step N`: the documents of the batch that made update N.

Order and position are arithmetic: the configuration, the data and the position in metrics.jsonl are enough. The batch
is made anew and its fingerprint compared with the one that the run logged, so what is printed is what was trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_prep.config_file import ConfigError, load_config
from data_prep.shards import Manifest, ShardError
from sutrain.config import PretrainConfig, batch_plan
from sutrain.data import (
    DataError,
    MixedSamples,
    Samples,
    open_manifest,
    open_samples,
    remote_of,
)
from sutrain.labelling import labelling_of
from sutrain.monitor.log import FILE_NAME, DamagedLogError, find_steps, last_steps
from sutrain.pieces import PieceReader


def batch_documents(run_dir: Path, step: int) -> Iterator[dict[str, Any]]:
    """Every document piece of the global batch of update `step`, sample by sample.

    {sample, data, row, source, file, block, record, piece, tokens, text}.
    Raises ConfigError, DataError, ShardError or DamagedLogError.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; --run wants the folder of a run")
    config = load_config(PretrainConfig, path)
    if step < 1:
        raise ConfigError(f"--step {step}: steps count from 1")
    labelling = labelling_of(config, open_manifest(config.data), stream="masks")
    samples = open_samples(config.data, config.seed, labelling)
    first, sequences = _position(config, run_dir, step, samples)
    corpora: list[Samples] = samples.corpora if isinstance(samples, MixedSamples) else [samples]
    corpus_N, number_N = np.zeros(sequences, np.int64), np.arange(first, first + sequences)
    if isinstance(samples, MixedSamples):
        corpus_N, number_N = samples.mixture.assign(first, sequences)
    remotes = [remote_of(config.data), *(None for _ in config.data.others)]
    readers = [
        PieceReader(corpus.manifest.directory, "train", remote=remote)
        for corpus, remote in zip(corpora, remotes, strict=True)
    ]
    decode = _decoder(samples.manifest)
    for sample, corpus, number in zip(range(first, first + sequences), corpus_N, number_N, strict=True):
        row = int(corpora[corpus].row_numbers(int(number), 1)[0])
        manifest = corpora[corpus].manifest
        tokens_L, pieces = readers[corpus].row(row)
        for piece in pieces:
            yield {
                "sample": sample,
                "data": str(manifest.directory),
                "row": row,
                "source": manifest.sources[piece.source]["name"],
                "file": manifest.files[piece.file]["path"],
                "block": piece.block,
                "record": piece.record,
                "piece": piece.piece,
                "tokens": piece.length,
                "text": decode(tokens_L[piece.start : piece.start + piece.length].tolist()),
            }


def _position(
    config: PretrainConfig, run_dir: Path, step: int, samples: Samples | MixedSamples
) -> tuple[int, int]:
    """(first sample, number of samples) of an update: as logged, checked by its fingerprint; where the log has a gap by
    arithmetic, with a warning.

    Raises ConfigError for an update beyond the last one logged, DataError, DamagedLogError.
    """
    log = run_dir / FILE_NAME
    last = next((record["step"] for record in last_steps(log, 1)), 0)
    if step > last:
        found = (
            f"the last update that the run logged is {last}" if last else "the run has logged no update yet"
        )
        raise ConfigError(f"--step {step}: {found}")
    logged = find_steps(log, {step - 1, step})
    if step not in logged:
        print(
            f"warning: {log} does not have step {step}: its position follows from config.yaml as it is now, and "
            "neither position nor content is checked",
            file=sys.stderr,
        )
        plan, first = batch_plan(config, samples.manifest.row_tokens, 1, 0), 0
        for _ in range(step - 1):
            first += plan.sequences_at(first)
        return first, plan.sequences_at(first)
    end = logged[step]["samples_consumed_total"]
    plan = batch_plan(config, samples.manifest.row_tokens, 1, 0)
    first = 0 if step == 1 else end - plan.global_sequences
    if step - 1 in logged:
        first = logged[step - 1]["samples_consumed_total"]
    fingerprint = f"{samples.batch(first, end - first).fingerprint:012x}"
    if fingerprint != logged[step]["batch_fingerprint"]:
        raise DataError(
            f"{config.data.dir}: the batch of step {step} is {fingerprint}, the run logged "
            f"{logged[step]['batch_fingerprint']}: the data is not what the run was trained on"
        )
    return first, end - first


def _decoder(manifest: Manifest) -> Callable[[list[int]], str]:
    """From token ids to text, special tokens left out."""
    specials = set(manifest.special_ids.values())
    path = Path(manifest.directory) / manifest.tokenizer["file"]
    if path.suffix == ".model":
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return lambda ids: model.decode([i for i in ids if i not in specials])
    words = path.read_text(encoding="utf-8").splitlines()
    return lambda ids: " ".join(words[i] for i in ids if i not in specials).replace(" ##", "")


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
    except (ConfigError, DataError, ShardError, DamagedLogError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
