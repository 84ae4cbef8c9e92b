"""Fill [MASK] in sentences with an exported model, through nothing but transformers.

`python -m cluster.fill_masks MODEL_DIR SENTENCE …`
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def main(folder: str, sentences: list[str]) -> None:
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits_BLV = model(**inputs).logits
    for row, sentence in enumerate(sentences):
        guessed = sentence
        for position in torch.nonzero(inputs["input_ids"][row] == tokenizer.mask_token_id).flatten():
            token = tokenizer.decode(int(logits_BLV[row, position].argmax()))
            guessed = guessed.replace(
                tokenizer.mask_token, f"\033[1m{token}\033[0m" if sys.stdout.isatty() else token, 1
            )
        print(f"  {sentence}\n  → {guessed}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
