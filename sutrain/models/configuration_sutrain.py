"""`EncoderConfig` as a Hugging Face configuration."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar

from transformers import PretrainedConfig

from .configuration import EncoderConfig, EncoderConfigError

_SETTINGS = {setting.name: setting.default for setting in fields(EncoderConfig)}
_ALMOST = 0.85
"""How alike (difflib) a misspelt name is. Below it are names of the library's own, as sep_token_id to pad_token_id."""


class SutrainConfig(PretrainedConfig):
    """Every field of `EncoderConfig` under its own name, and the customary Hugging Face names as aliases.

    Other keys are kept, as the library does: its own, those of later versions of it, and what somebody adds.

    Raises:
        EncoderConfigError: when the model it describes cannot exist, when a setting and its alias have different
            values, and for a key that is unknown and almost a setting's name; all problems of a kind at once.
    """

    model_type = "sutrain"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "feed_forward_size",
        "hidden_act": "activation",
        "hidden_dropout_prob": "hidden_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "max_position_embeddings": "max_row_tokens",
        "type_vocab_size": "token_types",
        "tie_word_embeddings": "tied_head",
    }

    def __init__(self, **kwargs: Any) -> None:
        if problems := [*self._contradictions(kwargs), *self._misspelt(kwargs)]:
            raise EncoderConfigError("\n".join(f"model.{problem}" for problem in problems))
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                kwargs[name] = kwargs.pop(alias)
        encoder = EncoderConfig(**{name: kwargs.pop(name, default) for name, default in _SETTINGS.items()})
        for name in _SETTINGS:
            setattr(self, name, getattr(encoder, name))
        super().__init__(**kwargs)

    @classmethod
    def _contradictions(cls, given: dict[str, Any]) -> list[str]:
        return [
            f"{name}: found {given[name]!r}, and {given[alias]!r} under its other name {alias}; give one of them"
            for alias, name in cls.attribute_map.items()
            if alias in given and name in given and given[alias] != given[name]
        ]

    @classmethod
    def _misspelt(cls, given: dict[str, Any]) -> list[str]:
        names = [*_SETTINGS, *cls.attribute_map]
        unknown = [key for key in given if key not in names and not hasattr(PretrainedConfig, key)]
        return [
            f"{key}: found {given[key]!r}, which no model reads; did you mean {near[0]}?"
            for key in unknown
            if (near := get_close_matches(key, names, 1, _ALMOST))
        ]

    def encoder_config(self) -> EncoderConfig:
        """The encoder that this configuration describes."""
        return EncoderConfig(**{name: getattr(self, name) for name in _SETTINGS})
