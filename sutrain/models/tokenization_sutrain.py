"""The sentencepiece tokenizer of the prepared data behind the Hugging Face interface.

Text is cleaned as it was for training, then segmented as it is: the sentencepiece model normalises
nothing and adds no prefix. Its special pieces have the ids [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3 and [MASK] 4.
"""

import re
import unicodedata
from pathlib import Path
from typing import Any

import transformers
from packaging import version
from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

OLDEST = "5.23"
"""The transformers that exported folders need."""

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_NEVER_TEXT = re.compile("[\x00\ud800-\udfff]+")  # NUL and surrogates
# Controls other than white space, and marks without a width; the joiners U+200C and U+200D matter and stay.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff0-\ufffb\ufffe\uffff\ud800-\udfff]+"
)


def refuse_older(found: str) -> None:
    """Raises ImportError for a transformers in which [CLS] and [SEP] would be missing without a word."""
    if version.parse(found) < version.parse(OLDEST):
        raise ImportError(
            f"transformers: found {found}, expected {OLDEST} or newer: pip install -U transformers"
        )


class SutrainTokenizer(PreTrainedTokenizer):
    """Text to `[CLS] text [SEP]`, or `[CLS] one [SEP] two [SEP]` for a pair, with token type 0 throughout.

    Words that are given apart (is_split_into_words) are joined as they are; give " walk" where a space stands before.

    Args:
        vocab_file: path of the sentencepiece model.
        unicode: Unicode normalisation of the training text: "nfc", "nfkc" or "none".
        strip_control: whether control characters were removed from it.
        collapse_whitespace: whether every run of white space became one space.
        continued: whether a model continues the text, which then is `[CLS] text`: its end is for the model to say.

    Raises:
        ImportError: when transformers is older than the exported files need.
        ValueError: when the sentencepiece model has other special pieces, or `unicode` another value.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        unicode: str = "nfc",
        strip_control: bool = True,
        collapse_whitespace: bool = True,
        continued: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_older(transformers.__version__)
        self.vocab_file = str(vocab_file)
        self.unicode, self.strip_control, self.collapse_whitespace = (
            unicode,
            strip_control,
            collapse_whitespace,
        )
        self.pieces = SentencePieceProcessor(model_proto=Path(vocab_file).read_bytes())
        if unicode not in ("nfc", "nfkc", "none"):
            raise ValueError(f"unicode: found {unicode!r}, expected nfc, nfkc or none")
        found = tuple(self.pieces.id_to_piece(i) for i in range(min(len(SPECIAL_PIECES), len(self.pieces))))
        if found != SPECIAL_PIECES:
            raise ValueError(f"{vocab_file}: found first pieces {found}, expected {SPECIAL_PIECES}")
        pad, unknown, start, end, mask = SPECIAL_PIECES
        kwargs |= {"pad_token": pad, "unk_token": unknown, "cls_token": start, "sep_token": end}
        # A masked word takes the space before it along, so that space must not become a piece of its own.
        added = kwargs.pop("added_tokens_decoder", {})
        added[SPECIAL_PIECES.index(mask)] = AddedToken(mask, lstrip=True, special=True, normalized=False)
        kwargs |= {"mask_token": mask, "added_tokens_decoder": added}
        kwargs |= {"token_type_ids_pattern": "all_zeros", "special_tokens_pattern": "cls_sep"}
        if continued:
            kwargs |= {"special_tokens_pattern": "bos", "bos_token": start, "eos_token": end}
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            vocab_file=self.vocab_file,
            unicode=unicode,
            strip_control=strip_control,
            collapse_whitespace=collapse_whitespace,
            continued=continued,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Pieces of the sentencepiece model, special ones included, added tokens excluded."""
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        pieces = {self.pieces.id_to_piece(i): i for i in range(len(self.pieces))}
        return pieces | self._added_tokens_encoder

    def clean(self, text: str) -> str:
        """The text as preparation would have made it."""
        text = (_CONTROL if self.strip_control else _NEVER_TEXT).sub("", text)
        if self.unicode != "none":
            text = unicodedata.normalize("NFKC" if self.unicode == "nfkc" else "NFC", text)
        return " ".join(text.split()) if self.collapse_whitespace else text

    def prepare_for_tokenization(
        self, text: str, is_split_into_words: bool = False, word: bool = False, **kwargs: Any
    ) -> tuple[str, dict[str, Any]]:
        """Clean a text, or a word with the space before it, before special tokens are looked for; a hook of the base
        class."""
        cleaned = self.clean(text)
        return (" " + cleaned if word and text[:1].isspace() else cleaned), kwargs

    def _encode_plus(
        self, text: Any, *arguments: Any, is_split_into_words: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        if kwargs.get("return_offsets_mapping"):
            raise NotImplementedError(
                "return_offsets_mapping: found True; cleaning moves characters, and nothing counts where they were: "
                "leave it out"
            )
        # `word` is what the base class hands down to the hook above; its own name for it stops here.
        kwargs |= {"is_split_into_words": is_split_into_words, "word": is_split_into_words}
        return super()._encode_plus(text, *arguments, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to text again; special tokens stand apart."""
        words: list[str] = []
        run: list[str] = []
        for token in tokens:
            if token in self._added_tokens_encoder:
                words += [self.pieces.decode_pieces(run), token]
                run = []
            else:
                run.append(token)
        words.append(self.pieces.decode_pieces(run))
        return " ".join(word for word in map(str.strip, words) if word)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the sentencepiece model; returns its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        path.write_bytes(self.pieces.serialized_model_proto())
        return (str(path),)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        # A model may have more rows than there are pieces: resize_token_embeddings(pad_to_multiple_of=64).
        return self.pieces.id_to_piece(index) if index < len(self.pieces) else str(self.unk_token)
