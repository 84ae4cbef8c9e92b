"""Small models, and a tokenizer trained on a few Chinese and English sentences."""

import random
from dataclasses import replace
from pathlib import Path

from data_prep.config import TrainSection
from data_prep.tokenizer import train
from sutrain.models.configuration import EncoderConfig

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_layers": 3}
GATED = {"gau_expansion_size": 64, "gau_key_size": 16}
ATTENTION = {"num_heads": 3, "head_size": 8, "feed_forward_size": 48}
CONFIGS = {
    "roformer_v2": EncoderConfig(**SIZES, **ATTENTION),
    "gau_alpha": EncoderConfig(
        **SIZES,
        **GATED,
        mixer="gau",
        score_normaliser="softmax_plus",
        initialisation="gau_alpha",
    ),
    "deepnorm": EncoderConfig(
        **SIZES,
        **ATTENTION,
        residual="deepnorm",
        initialisation="deepnorm",
        norm="layer_norm",
        norm_epsilon=1e-5,
        biases=True,
    ),
    "pre": EncoderConfig(
        **SIZES, **ATTENTION, residual="pre", norm="rms_gain", activation="swiglu", tied_head=False
    ),
    "flash": EncoderConfig(
        **SIZES,
        **GATED,
        mixer="flash",
        flash_chunk_size=8,
        score_normaliser="relu_squared",
        initialisation="gau_alpha",
    ),
    "bert": EncoderConfig(
        **SIZES,
        **ATTENTION,
        positions="learned",
        max_row_tokens=64,
        head="bert",
        biases=True,
        norm="layer_norm",
        activation="gelu",
        initialisation="bert",
        embedding_dropout="after_norm",
    ),
    "causal": EncoderConfig(
        **SIZES,
        **ATTENTION,
        context="causal",
        positions="rotary_half",
        residual="pre",
        norm="rms_gain",
        score_normaliser="softmax_plus",
        initialisation="su_adam",
        token_types=0,
    ),
}
"""One configuration of every kind of mixer, residual, norm and initialisation."""

VARIANTS = CONFIGS | {
    "causal_flash": replace(CONFIGS["flash"], context="causal", score_normaliser="relu_squared_n2"),
    "squared_gau": replace(CONFIGS["gau_alpha"], score_normaliser="relu_squared", biases=True),
    "squared_n2_gau": replace(CONFIGS["gau_alpha"], score_normaliser="relu_squared_n2", context="causal"),
    "squared_heads": replace(CONFIGS["roformer_v2"], score_normaliser="relu_squared", positions="none"),
    "unilm": replace(CONFIGS["roformer_v2"], context="unilm"),
    "unilm_gau": replace(CONFIGS["gau_alpha"], context="unilm"),
    "talking": replace(CONFIGS["roformer_v2"], talking_heads="both", value_head_size=12),
    "hierarchical": replace(CONFIGS["bert"], hierarchical_alpha=0.4, max_row_tokens=10),
    "rezero": replace(CONFIGS["roformer_v2"], residual="rezero", initialisation="plain"),
    "ramp": replace(CONFIGS["roformer_v2"], residual="ramp", ramp_steps=10),
    "su_adam": replace(
        CONFIGS["roformer_v2"], residual="deepnorm", initialisation="su_adam", fan_average="geometric"
    ),
}
"""Those, and every other choice at least once."""

ENGLISH = """
the weather in this city is very good today and we walk through a park with old friends who like to talk about
language models data science music and food because it makes them happy
"""
CHARACTERS = "今天天气很好我们去公园散步北京是中国的首都他们喜欢学习语言模型和音乐"


def sentences(count: int, seed: int = 0) -> list[str]:
    """English and Chinese sentences of random words, half each."""
    draw = random.Random(seed)
    english = [
        " ".join(draw.choices(ENGLISH.split(), k=draw.randint(4, 14))) + "." for _ in range(count // 2)
    ]
    chinese = [
        "".join(draw.choices(CHARACTERS, k=draw.randint(5, 25))) + "。" for _ in range(count - count // 2)
    ]
    return english + chinese


def write_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    """Train tokenizer.model in `folder` as data preparation does; returns the folder."""
    section = TrainSection(vocab_size=vocab_size, threads=1, character_coverage=1.0)
    model, _ = train(iter(sentences(600)), section)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    return folder
