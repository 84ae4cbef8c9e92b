"""What costs a forward pass of its own, every few steps, on a small batch that is kept for the run.

    model update          RMS of F(x; θ_t) − F(x; θ_{t−1}), F the encoder's output: the change of the function that
                          one update makes, which is what DeepNet bounds (arXiv 2203.00555; kexue.fm/archives/8978)
    attention entropy     mean over heads and queries of −Σ p ln p, by layer, nats (kexue.fm/archives/8823)

Both are computed in fp32 from the master weights: in bf16 the change of a small update drowns in rounding. The masters
are put together from their slices, so every rank takes part; only rank 0 computes. Neither the training weights nor a
random stream is touched. B rows, L tokens, D hidden size, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sutrain.models.attention import probabilities
from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.optim import FragmentMap


class Probe:
    """Call `before` ahead of an update and `after` behind it, on all ranks; rank 0 gets the numbers."""

    def __init__(
        self,
        config: EncoderConfig,
        fragments: FragmentMap,
        every_steps: int,
        tokens_BL: Tensor,
        document_BL: Tensor,
    ) -> None:
        self.every_steps, self._first = every_steps, True
        self.fragments, self.tokens_BL, self.document_BL = fragments, tokens_BL, document_BL
        self.model: MaskedLanguageModel | None = None
        if fragments.rank == 0 and every_steps:
            with torch.random.fork_rng(devices=[]):  # building a model draws its initial weights
                self.model = MaskedLanguageModel(config).float().eval().to(tokens_BL.device)
        self._before_BLD: Tensor | None = None

    def due(self, step: int) -> bool:
        """Is the update that makes `step` to be probed? The first of a process is; none is if every_steps is 0."""
        wanted = self.every_steps > 0 and (self._first or step % self.every_steps == 0)
        self._first = False
        return wanted

    @torch.no_grad()
    def before(self) -> None:
        """The function as it is ahead of an update."""
        self._load_masters()
        if self.model is not None:
            self._before_BLD = self.model(self.tokens_BL, self.document_BL)

    @torch.no_grad()
    def after(self) -> dict[str, Any]:
        """{model_update, attention_entropy: one number a layer} on rank 0, {} elsewhere."""
        self._load_masters()
        if self.model is None or self._before_BLD is None:
            return {}
        entropies: list[float] = []

        def measure(mixer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            visible = keywords["visible"]
            query_BHLK, key_BHLK = mixer.query_key(arguments[0], visible)
            spread_BHLL = probabilities(query_BHLK, key_BHLK, visible.mask)
            entropy_BHL = -torch.special.xlogy(spread_BHLL, spread_BHLL).sum(-1)
            real_BL = self.document_BL > 0
            entropies.append(float(entropy_BHL.mean(1)[real_BL].mean()))

        mixers: list[torch.nn.Module] = [layer.mixer for layer in self.model.encoder.layers]  # type: ignore[misc]
        hooks = [mixer.register_forward_pre_hook(measure, with_kwargs=True) for mixer in mixers]
        after_BLD = self.model(self.tokens_BL, self.document_BL)
        for hook in hooks:
            hook.remove()
        change_ND = (after_BLD - self._before_BLD)[self.document_BL > 0]
        self._before_BLD = None
        return {"model_update": float(change_ND.square().mean().sqrt()), "attention_entropy": entropies}

    def _load_masters(self) -> None:
        """Put every tensor together from the slices of all ranks, one at a time, into the probe's model on rank 0."""
        parameters = dict(self.model.named_parameters()) if self.model is not None else {}
        pieces: dict[str, list[Any]] = {}
        for piece in self.fragments.fragments:
            pieces.setdefault(piece.name, []).append(piece)
        for name, shape in self.fragments.shapes.items():
            whole = torch.zeros(shape.numel(), device=self.fragments.device)
            for piece in pieces.get(name, []):
                whole[piece.offset : piece.offset + piece.length] = piece.values()
            self.fragments.all_reduce(whole)
            if name in parameters:
                parameters[name].copy_(whole.view(shape))
