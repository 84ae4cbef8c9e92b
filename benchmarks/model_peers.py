"""The models that benchmarks/model.py compares: ours and others' of the same shape, cut between trunk and head.

B rows, L tokens a row, D hidden size, V vocabulary. Weights are bf16, nothing is dropped (torch's fused attention on
a CPU has no dropout), and documents of a packed row do not see each other in any of them. What a model needs in FLOPs
is what `flops_per_token` counts, for the tokens that are real, the pairs of tokens that see each other and the
positions that are predicted, which are all that is needed of the last feed-forward block too: padding, pairs under a
mask and scores that nobody asked for are work, but no work that was needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sutrain.masking import IGNORED
from sutrain.models.configuration import EncoderConfig, flops_per_token
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.models.processor import bf16_units
from sutrain.objectives.masked_lm import filled_up, masked_lm_loss, predicted_positions

PREDICTED = 0.15
RESERVED = 5
"""Ids below are special."""
LAYOUTS = ("padded", "packed")
LOCAL_TOKENS = 128
"""Width of ModernBERT's local attention, two layers of three."""


@dataclass
class Batch:
    """Rows of documents; `lengths` are those of the documents."""

    tokens_BL: Tensor
    document_BL: Tensor  # 0 is padding
    labels_BL: Tensor
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def predicted(self) -> int:
        return int((self.labels_BL != IGNORED).sum())

    @property
    def one_document_a_row(self) -> bool:
        return int(self.document_BL.max()) == 1

    def seen(self, window: int = 0) -> float:
        """Tokens that a token sees, on average; of a window at most `window` and itself."""
        return sum(n * min(n, window + 1 if window else n) for n in self.lengths) / self.tokens

    def same_document(self) -> Tensor:
        """bool [B, 1, L, L]; padding sees padding, so that no row of a softmax is empty."""
        return (self.document_BL.unsqueeze(2) == self.document_BL.unsqueeze(1)).unsqueeze(1)


def make_batch(layout: str, rows: int, length: int, vocab: int, device: torch.device, seed: int = 0) -> Batch:
    """Random tokens: `padded` has a document of L/4 to L tokens in every row, the first one whole; `packed` fills rows
    with documents of L/8 to L/2 tokens; `full` has one document of L tokens a row."""
    random = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(max(low, 1), high + 1, (1,), generator=random))

    document_BL, lengths = torch.zeros(rows, length, dtype=torch.long), []
    for row in range(rows):
        at, number = 0, 0
        while at < length and not (number and layout != "packed"):
            whole = layout == "full" or (layout == "padded" and row == 0)
            size = length if whole else between(length // 4, length)
            if layout == "packed":
                size = min(between(length // 8, length // 2), length - at)
            number += 1
            document_BL[row, at : at + size] = number
            lengths.append(size)
            at += size
    tokens_BL = torch.randint(RESERVED, vocab, (rows, length), generator=random)
    tokens_BL = tokens_BL.where(document_BL > 0, torch.zeros_like(tokens_BL))
    chosen = (torch.rand(rows, length, generator=random) < PREDICTED) & (document_BL > 0)
    chosen[0, 0] = True
    labels_BL = torch.where(chosen, tokens_BL, torch.full_like(tokens_BL, IGNORED))
    return Batch(tokens_BL.to(device), document_BL.to(device), labels_BL.to(device), lengths)


@dataclass
class Contender:
    """A model and how to run it; `trunk` gives hidden vectors, all or (ours) those that are predicted, `head` the mean
    loss."""

    model: nn.Module
    config: EncoderConfig  # of what it needs in FLOPs
    trunk: Callable[[Batch], Tensor]
    head: Callable[[Tensor, Batch], Tensor]
    layers: list[nn.Module]
    windows: tuple[int, ...] = (0,)  # of its layers' attention, in turn; 0: all of the document

    def flops(self, batch: Batch) -> float:
        """Needed for forward and backward of trunk and head."""
        seen = sum(batch.seen(window) for window in self.windows) / len(self.windows)
        return flops_per_token(self.config, seen, batch.predicted / batch.tokens) * batch.tokens  # type: ignore[arg-type]


def recomputed_flops(config: EncoderConfig, row_tokens: int) -> float:
    """FLOPs a token of the trunk where every layer's forward pass is made twice: four thirds of the plain count."""
    return flops_per_token(config, row_tokens, 0.0) * 4 / 3


Build = Callable[[EncoderConfig], Contender]
"""From the shape of RoFormerV2, as a configuration of ours."""


def ours(config: EncoderConfig) -> Contender:
    model = MaskedLanguageModel(config)

    def head(hidden_PD: Tensor, batch: Batch) -> Tensor:
        hidden_BL = batch.labels_BL != IGNORED
        loss = masked_lm_loss(
            lambda *_, **__: hidden_PD,
            model.logits,
            batch.tokens_BL,
            batch.labels_BL,
            hidden_BL,
            batch.document_BL,
        )
        return loss.loss_sum / hidden_BL.sum()

    def trunk(batch: Batch) -> Tensor:
        positions = filled_up(predicted_positions(batch.labels_BL))
        return model(batch.tokens_BL, batch.document_BL, positions_M=positions)

    return Contender(model, config, trunk, head, [*model.encoder.layers])


def gau(config: EncoderConfig) -> Contender:
    """GAU-alpha: two units in place of a layer."""
    return ours(gau_config(config))


def gau_config(config: EncoderConfig) -> EncoderConfig:
    shape = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}
    return EncoderConfig(
        mixer="gau", num_layers=2 * config.num_layers, gau_expansion_size=2 * config.hidden_size,
        score_normaliser="softmax_plus", initialisation="gau_alpha", max_row_tokens=config.max_row_tokens,
        hidden_dropout=config.hidden_dropout, attention_dropout=config.attention_dropout, **shape,
    )  # fmt: skip


def bert_config(config: EncoderConfig) -> EncoderConfig:
    return replace(
        config, positions="learned", activation="gelu", norm="layer_norm", biases=True, initialisation="bert",
        embedding_dropout="after_norm", head="bert",
    )  # fmt: skip


def everywhere(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Batch], Tensor]:
    """The head as transformers' BERT and RoFormer have it: scores of all positions, most of them ignored."""
    return lambda hidden_BLD, batch: F.cross_entropy(
        score(hidden_BLD).flatten(0, 1), batch.labels_BL.flatten(), ignore_index=IGNORED
    )


def where_predicted(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Batch], Tensor]:
    """Scores at predicted positions alone, as ModernBERT's sparse_prediction has them."""

    def head(hidden_BLD: Tensor, batch: Batch) -> Tensor:
        positions_BL = batch.labels_BL != IGNORED
        return F.cross_entropy(score(hidden_BLD[positions_BL]), batch.labels_BL[positions_BL])

    return head


def _sizes(config: EncoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "pad_token_id": 0,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_row_tokens,
    }  # fmt: skip


_UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def fastest_attention() -> str:
    """Of transformers' models: torch's fused one, but on a CPU whose instructions for bf16 that makes no use of, where
    plain products compiled are ahead at 512 tokens."""
    return "eager" if not torch.cuda.is_available() and bf16_units() == "vectors" else "sdpa"


def bert(config: EncoderConfig, masked_head: bool = False, attention: str | None = None) -> Contender:
    from transformers import BertConfig, BertForMaskedLM

    attention = attention or fastest_attention()
    settings = BertConfig(
        **_sizes(config),
        intermediate_size=config.feed_forward_size,
        attn_implementation=attention,
        **_UNDROPPED,
    )
    model = BertForMaskedLM(settings)

    def trunk(batch: Batch) -> Tensor:
        # Rows of one document: the 2D mask, of which nothing is left when there is no padding.
        mask = (batch.document_BL > 0).long() if batch.one_document_a_row else batch.same_document()
        if attention == "eager" and mask.dim() == 4:
            mask = additive(mask, model.dtype)
        return model.bert(batch.tokens_BL, attention_mask=mask).last_hidden_state

    head = (where_predicted if masked_head else everywhere)(model.cls)
    return Contender(model, bert_config(config), trunk, head, [*model.bert.encoder.layer])


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def roformer(config: EncoderConfig) -> Contender:
    """transformers' RoFormer is version 1 and has one attention, the plain one."""
    from transformers import RoFormerConfig, RoFormerForMaskedLM

    settings = RoFormerConfig(
        **_sizes(config),
        intermediate_size=config.feed_forward_size,
        embedding_size=config.hidden_size,
        **_UNDROPPED,
    )
    model = RoFormerForMaskedLM(settings)

    def trunk(batch: Batch) -> Tensor:
        mask = (batch.document_BL > 0).long()
        if not batch.one_document_a_row:
            mask = additive(batch.same_document(), model.dtype)
        return model.roformer(batch.tokens_BL, attention_mask=mask).last_hidden_state

    needed = replace(bert_config(config), positions="rotary")
    return Contender(model, needed, trunk, everywhere(model.cls), [*model.roformer.encoder.layer])


def modernbert(config: EncoderConfig) -> Contender:
    """Its gated feed-forward block gets two thirds of the inner size, which is the same number of weights."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    inner, attention = config.feed_forward_size * 2 // 3, fastest_attention()
    settings = ModernBertConfig(
        **_sizes(config), intermediate_size=inner, local_attention=LOCAL_TOKENS, attn_implementation=attention,
        sparse_prediction=True, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model = ModernBertForMaskedLM(settings)

    def trunk(batch: Batch) -> Tensor:
        mask: Any = (batch.document_BL > 0).long()
        if not batch.one_document_a_row:
            place = torch.arange(batch.tokens_BL.shape[1], device=mask.device)
            near = (place[:, None] - place[None]).abs() <= LOCAL_TOKENS // 2
            same = batch.same_document()
            mask = {"full_attention": same, "sliding_attention": same & near}
            if attention == "eager":
                mask = {kind: additive(seen, model.dtype) for kind, seen in mask.items()}
        return model.model(batch.tokens_BL, attention_mask=mask).last_hidden_state

    needed = replace(bert_config(config), positions="rotary", activation="geglu", feed_forward_size=inner)
    windows = (0, LOCAL_TOKENS, LOCAL_TOKENS) if config.num_layers % 3 == 0 else (0,)
    head = where_predicted(lambda hidden: model.decoder(model.head(hidden)))
    return Contender(model, needed, trunk, head, [*model.model.layers], windows)


def x_transformers(config: EncoderConfig) -> Contender:
    """Pre-norm with gains, rotary positions, no biases; flash attention (torch's fused kernel) where it is fastest."""
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(
        dim=config.hidden_size, depth=config.num_layers, heads=config.num_heads, attn_dim_head=config.head_size,
        rotary_pos_emb=True, use_rmsnorm=True, ff_no_bias=True, attn_flash=fastest_attention() == "sdpa", verbose=False,
        ff_mult=config.feed_forward_size / config.hidden_size,
    )  # fmt: skip
    model = TransformerWrapper(
        num_tokens=config.vocab_size,
        max_seq_len=config.max_row_tokens,
        attn_layers=layers,
        tie_embedding=True,
    )

    def trunk(batch: Batch) -> Tensor:
        # Its `mask` of padding makes bf16 to fp32 in passing, its `attn_mask` does not.
        real = batch.document_BL > 0
        masks = {} if bool(real.all()) else {"attn_mask": real[:, None, None]}
        if not batch.one_document_a_row:
            masks = {"attn_mask": batch.same_document()}
        return model(batch.tokens_BL, return_embeddings=True, **masks)

    return Contender(model, config, trunk, where_predicted(model.to_logits), [*_blocks(layers)])


def _blocks(layers: nn.Module) -> Iterator[nn.Module]:
    for norms_block_join in layers.layers:  # type: ignore[union-attr]
        yield norms_block_join[1]  # type: ignore[index]


OURS, GAU = "RoFormerV2 (sutrain)", "GAU-alpha (sutrain)"
BERT, X_TRANSFORMERS = "BERT (transformers)", "x-transformers"
CONTENDERS: dict[str, Build] = {
    OURS: ours,
    GAU: gau,
    BERT: bert,
    "BERT, masked head": lambda config: bert(config, masked_head=True),
    "ModernBERT (transformers)": modernbert,
    "RoFormer v1 (transformers)": roformer,
    X_TRANSFORMERS: x_transformers,
}


def available() -> dict[str, Build]:
    """The contenders whose packages are here."""
    here = {n: build for n, build in CONTENDERS.items() if n != X_TRANSFORMERS or find_spec("x_transformers")}
    if len(here) < len(CONTENDERS):
        print(f"{X_TRANSFORMERS}: not measured, it is not installed (see --help)", flush=True)
    return here


def key(name: str) -> str:
    return name.split(" (")[0].lower().replace(", ", "_").replace(" ", "_").replace("-", "_")
