"""`python -m sutrain.replay --run RUN_DIR --step N`: the documents of the batch that made update N.

Order and position are arithmetic: the data, a position in metrics.jsonl and the settings with which the run went on
there are enough. The batch is made anew and its fingerprint compared with the one that the run logged, so what is
printed is what was trained on.
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
from sutrain.continuity import ACCEPTABLE, rule_of
from sutrain.data import (
    DataError,
    MixedSamples,
    Samples,
    open_manifest,
    open_samples,
    remote_of,
)
from sutrain.labelling import labelling_of
from sutrain.monitor.log import FILE_NAME, DamagedLogError, find_origin, last_steps
from sutrain.pieces import PieceReader


def batch_documents(run_dir: Path, step: int) -> Iterator[dict[str, Any]]:
    """Every document piece of the global batch of update `step`, sample by sample.

    {sample, data, row, source, file, block, record, piece, tokens, text}.
    Raises ConfigError, DataError, ShardError or DamagedLogError.
    """
    config, record, known, later = _origin(run_dir, step)
    labelling = labelling_of(config, open_manifest(config.data), stream="masks")
    samples = open_samples(config.data, config.seed, labelling)
    first, sequences = _position(config, samples, step, record, known, later)
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


def _origin(
    run_dir: Path, step: int
) -> tuple[PretrainConfig, dict[str, Any] | None, tuple[int, int], list[dict]]:
    """(the configuration as far as batches go when update `step` was made, its record if the log has it, the last
    position known before it as (updates made, samples consumed), the starts after it).

    Raises ConfigError for an update beyond the last one logged, DamagedLogError.
    """
    path, log = run_dir / "config.yaml", run_dir / FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; --run wants the folder of a run")
    config = load_config(PretrainConfig, path)
    if step < 1:
        raise ConfigError(f"--step {step}: steps count from 1")
    last = next((record["step"] for record in last_steps(log, 1)), 0)
    if step > last:
        found = (
            f"the last update that the run logged is {last}" if last else "the run has logged no update yet"
        )
        raise ConfigError(f"--step {step}: {found}")
    record, before, starts = find_origin(log, step)
    known = (before["step"], before["samples_consumed_total"]) if before else (0, 0)
    own = [start for start in starts if start["step"] < step]
    if own:
        config = PretrainConfig.model_validate(config.model_dump(mode="json") | own[-1].get("reads", {}))
        if "totals_before" in own[-1]:
            known = max(known, (own[-1]["step"], own[-1]["totals_before"]["samples_consumed_total"]))
    return config, record, known, starts[len(own) :]


def _position(
    config: PretrainConfig, samples: Samples | MixedSamples, step: int, record: dict[str, Any] | None,
    known: tuple[int, int], later: list[dict],
) -> tuple[int, int]:  # fmt: skip
    """(first sample, number of samples) of an update: from the last position known before it by arithmetic, checked by
    the fingerprint that was logged; where the log has a gap there is none, and a warning says so.

    Raises DataError, saying what is not as it was.
    """
    plan = batch_plan(config, samples.manifest.row_tokens, 1, 0)
    made, first = known
    for _ in range(step - 1 - made):
        first += plan.sequences_at(first)
    if record is None:
        print(
            f"warning: the log does not have step {step}: its position follows from that of step {made} and the "
            "settings of batch, and neither position nor content is checked",
            file=sys.stderr,
        )
        return first, plan.sequences_at(first)
    end, logged = record["samples_consumed_total"], record["batch_fingerprint"]
    # Behind a gap the settings of batch may be others than those of then, and yet one of the sizes fits.
    sizes = [plan.global_sequences, *(size for _, size in plan.size_warmup)] if made < step - 1 else []
    fingerprints = {}
    for start in dict.fromkeys((first, *(end - size for size in sizes if size))):
        if 0 <= start < end:
            fingerprints[start] = f"{samples.batch(start, end - start).fingerprint:012x}"
            if fingerprints[start] == logged:
                return start, end - start
    changes = [
        f"after step {start['step']} the run went on with another {line}"
        for start in later
        for line in start.get("changes", [])
        if rule_of(line.partition(":")[0]) in ACCEPTABLE
    ]
    why = "the data is not what the run was trained on"
    if changes:
        why = "; ".join(changes)
    elif sizes:
        gap = f"steps {made + 1} to {step - 1} are not in the log"
        why = f"{gap}, and the settings of batch are not those of then, or {why}"
    found = ", ".join(fingerprints.values()) or "not to be found"
    raise DataError(f"{config.data.dir}: the batch of step {step} is {found}, the run logged {logged}: {why}")


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
