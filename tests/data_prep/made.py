"""Small synthetic text in Chinese and English, and the real pipeline over it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from data_prep.config import PrepareConfig
from data_prep.run import run
from data_prep.shards import Manifest, SplitReader

ROOT = Path(__file__).resolve().parents[2]
_WORDS = [f"{a}{b}" for a in "人法权国规应机责合财" for b in "民律利家定当关任同产"]
_ENGLISH = [a + b for a in ("pro", "con", "re", "sub") for b in ("tect", "tract", "port", "sist", "ject")]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct short texts, two thirds Chinese and one third English."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        words = draw.choices(_ENGLISH, k=draw.randint(3, 40)) if number % 3 == 0 else None
        text = " ".join(words) if words else "".join(draw.choices(_WORDS, k=draw.randint(3, 40))) + "。"
        texts.append(f"{text} {number}")
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings(output: Path, paths: list[Path | str], **sections: Any) -> dict[str, Any]:
    """A configuration tree for little text; `sections` are merged into it."""
    tree: dict[str, Any] = {
        "seed": 5,
        "output_dir": str(output),
        "corpora": [{"name": "made", "paths": [str(path) for path in paths]}],
        "cleaning": {"max_record_bytes": 1024**2},
        "tokenizer": {"train": {"model": "bpe", "vocab_size": 300, "sample_bytes": 1_000_000}},
        "shards": {"row_tokens": 32, "target_bytes": 20_000, "block_bytes": 2048, "validation_share": 0.1},
        "quarantine": {"max_record_share": 0.5, "max_file_share": 1.0},
        "resources": {"workers": 1, "log_seconds": 60},
    }
    for key, value in sections.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return tree


def prepare(tree: dict[str, Any], executor: str = "local", fresh: bool = False) -> Manifest:
    """Run the pipeline in this process."""
    return run(PrepareConfig.model_validate(tree), executor, fresh)


def command_line(tree: dict[str, Any], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m data_prep ARGUMENTS --config …` in a process of its own."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    command = [sys.executable, "-m", "data_prep", *arguments, "--config", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def content_files(output: Path) -> dict[str, bytes]:
    """Every file of an output that must not depend on how it was made."""
    names = ["manifest.json", "token_counts.bin", "quarantine.jsonl", "tokenizer/tokenizer.model"]
    paths = [output / name for name in names] + sorted(output.glob("*/shard-*"))
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def documents_of(output: Path, split: str) -> list[tuple[tuple[int, int, int], list[int]]]:
    """((file, block, record), ids) of every document of a split, in the order on disk."""
    reader = SplitReader(output, split)
    found: list[tuple[tuple[int, int, int], list[int]]] = []
    for shard in range(len(reader.manifest.splits[split].shards)):
        blocks = reader._reader(shard)
        for number in range(len(blocks.blocks)):
            block = blocks.read(number)
            for row, start, length, _, file, block_number, record, piece in block.pieces.T.tolist():
                tokens = block.tokens_NL[row, start : start + length].tolist()
                if piece:
                    assert found[-1][0] == (file, block_number, record)
                    found[-1][1].extend(tokens)
                else:
                    found.append(((file, block_number, record), tokens))
    return found
