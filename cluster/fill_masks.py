"""Fill [MASK] in sentences with an exported model, through nothing but transformers.

`python -m cluster.fill_masks MODEL_DIR SENTENCE …`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every sentence with the likeliest token at each of its masks; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.fill_masks", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "folder", type=Path, metavar="MODEL_DIR", help="what python -m sutrain.export has written"
    )
    parser.add_argument(
        "sentences", nargs="+", metavar="SENTENCE", help="text with [MASK] in it, which stands for one token"
    )
    options = parser.parse_args(arguments)
    if not (options.folder / "config.json").is_file():
        print(
            f"error: {options.folder}: no config.json; expected an exported model's folder", file=sys.stderr
        )
        return 2
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.folder, trust_remote_code=True)
    if without := [sentence for sentence in options.sentences if tokenizer.mask_token not in sentence]:
        print(f"error: no {tokenizer.mask_token} in {without[0]!r}", file=sys.stderr)
        return 2
    model = AutoModelForMaskedLM.from_pretrained(options.folder, trust_remote_code=True).eval()
    inputs = tokenizer(options.sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits_BLV = model(**inputs).logits
    for row, sentence in enumerate(options.sentences):
        guessed = sentence
        for position in torch.nonzero(inputs["input_ids"][row] == tokenizer.mask_token_id).flatten():
            token = tokenizer.decode(int(logits_BLV[row, position].argmax()))
            guessed = guessed.replace(
                tokenizer.mask_token, f"\033[1m{token}\033[0m" if sys.stdout.isatty() else token, 1
            )
        print(f"  {sentence}\n  → {guessed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
