"""Taking over the pieces of somebody else's sentencepiece model.

Shards have fixed special ids, ids must stand for the characters of the text one after the other, and cleaning is done
before. So the pieces and their scores are kept, with the five special pieces in front (the ids of the others shift),
and the model's own normalisation, dummy prefix, white space rules and byte pieces are left out.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from .config import TokenizerSection
from .errors import DataPrepError
from .places import place
from .shards import SPECIAL_IDS
from .tokenizer import AnyTokenizer, _ModelProto, changes_of_text, make_tokenizer, read_model


def adopt(serialized: bytes, name: str) -> tuple[bytes, dict[str, Any]]:
    """The model with our special pieces, and what was left out. Raises DataPrepError for models of words, of
    characters, or with white space behind a word.
    """
    kinds = _ModelProto.SentencePiece
    model = _ModelProto()
    try:
        model.ParseFromString(serialized)
    except DecodeError as error:
        raise DataPrepError(f"{name}: not a sentencepiece model ({error})") from None
    spec = model.trainer_spec
    if (
        spec.model_type not in (1, 2)
        or spec.treat_whitespace_as_suffix
        or not model.normalizer_spec.escape_whitespaces
    ):
        raise DataPrepError(
            f"{name}: only unigram and BPE models with white space before the word can be taken over"
        )
    kept = [p for p in model.pieces if p.type == kinds.NORMAL and p.piece not in SPECIAL_IDS]
    left_out = [p.piece for p in model.pieces if p.type != kinds.NORMAL]
    settings = changes_of_text(model)
    found = _ModelProto()
    found.CopyFrom(model)
    del found.pieces[:]
    for piece in SPECIAL_IDS:
        kind = kinds.UNKNOWN if piece == "[UNK]" else kinds.CONTROL
        found.pieces.add(piece=piece, score=0.0, type=kind)
    found.pieces.extend(kept)
    found.normalizer_spec.Clear()
    found.normalizer_spec.name = "identity"
    found.normalizer_spec.add_dummy_prefix = False
    found.normalizer_spec.remove_extra_whitespaces = False
    found.normalizer_spec.escape_whitespaces = True
    found.denormalizer_spec.Clear()
    names = (("pad", "[PAD]"), ("unk", "[UNK]"), ("bos", "[CLS]"), ("eos", "[SEP]"))
    for key, piece in names:
        setattr(found.trainer_spec, f"{key}_id", SPECIAL_IDS[piece])
        setattr(found.trainer_spec, f"{key}_piece", piece)
    found.trainer_spec.unk_surface = "[UNK]"
    found.trainer_spec.byte_fallback = False
    del found.trainer_spec.control_symbols[:]
    del found.trainer_spec.user_defined_symbols[:]
    found.trainer_spec.control_symbols.append("[MASK]")
    found.trainer_spec.vocab_size = len(found.pieces)
    return found.SerializeToString(deterministic=True), {
        "pieces_left_out": left_out[:300],
        "settings_left_out": settings,
    }


def load(section: TokenizerSection) -> tuple[bytes, AnyTokenizer, dict[str, Any]]:
    """The file of a tokenizer that is loaded, the tokenizer, and what was left out of a model that was taken over."""
    name, notes = section.load or "", dict[str, Any]()
    data = read_model(place(name))
    if section.adopt:
        data, notes = adopt(data, name)
    return data, make_tokenizer(data, name), notes
