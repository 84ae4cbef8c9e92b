"""`EncoderConfig` as a Hugging Face configuration."""

from dataclasses import fields
from typing import Any, ClassVar

from transformers import PretrainedConfig

from .configuration import EncoderConfig

_SETTINGS = {setting.name: setting.default for setting in fields(EncoderConfig)}


class SutrainConfig(PretrainedConfig):
    """Every field of `EncoderConfig` under its own name, and the customary Hugging Face names as aliases.

    Raises:
        EncoderConfigError: when the model it describes cannot exist; all problems at once.
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
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                kwargs.setdefault(name, kwargs.pop(alias))
        encoder = EncoderConfig(**{name: kwargs.pop(name, default) for name, default in _SETTINGS.items()})
        for name in _SETTINGS:
            setattr(self, name, getattr(encoder, name))
        super().__init__(**kwargs)

    def encoder_config(self) -> EncoderConfig:
        """The encoder that this configuration describes."""
        return EncoderConfig(**{name: getattr(self, name) for name in _SETTINGS})
