"""What costs a forward pass of its own, now and then (probe_interval.py), on a small batch that is kept for the run.

    model update          RMS of F(x; θ_t) − F(x; θ_{t−1}), F the encoder's output: the change of the function that
                          one update makes, which is what DeepNet bounds (arXiv 2203.00555; kexue.fm/archives/8978)
    its noise             the same when every weight is rounded anew in fp32; taken once, at the first probe
    attention entropy     mean over heads and queries of −Σ p ln p, by layer, nats (kexue.fm/archives/8823)
    activation RMS        of every layer's output, and how much of it the layer changed: ‖x_{l+1} − x_l‖ / ‖x_l‖
    branch share          ‖f(x)‖ / ‖α x‖, of mixer and feed-forward against the residual that they are added to
    dead units            share of inner units below DEAD_UNIT of the layer's RMS at every token
    logits                RMS about their mean over the vocabulary (a constant changes nothing), and the largest

All are computed in fp32 from the master weights: in bf16 the change of a small update drowns in rounding. The masters
are put together from their slices, so every rank takes part; only rank 0 computes. Neither the training weights nor a
random stream is touched. B rows, L tokens, D hidden size, H heads, N real tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.monitor.probe_interval import ProbeInterval
from sutrain.optim import FragmentMap

DEAD_UNIT = 1e-3
LOGIT_POSITIONS = 256
"""Tokens whose logits are looked at: enough for a scale, and small next to the probe's forward pass."""
NOISE_FACTOR = 3.0
"""A model update below this many times its noise is called noise."""


class Probe:
    """Call `before` ahead of an update and `after` behind it, on all ranks; rank 0 gets the numbers."""

    def __init__(
        self,
        config: EncoderConfig,
        fragments: FragmentMap,
        tokens_BL: Tensor,
        document_BL: Tensor,
        every_steps: int | None = None,
        share: float = 0.02,
        token_types_BL: Tensor | None = None,
    ) -> None:
        """every_steps: updates between probes, 0: none, None: as many as keep probes below `share` of the time."""
        basis = {"rows": len(tokens_BL), "world_size": fragments.ranks}
        self.interval, self._first = ProbeInterval(every_steps, share, basis), True
        self.seconds = 0.0
        self.fragments, self.tokens_BL, self.document_BL = fragments, tokens_BL, document_BL
        self.inputs = (tokens_BL, document_BL, token_types_BL)
        self.model: MaskedLanguageModel | None = None
        if fragments.rank == 0 and every_steps != 0:
            with torch.random.fork_rng(devices=[]):  # building a model draws its initial weights
                self.model = MaskedLanguageModel(config).float().eval().to(tokens_BL.device)
            self.model.encoder.take_rows_apart = False  # what the hooks see are rows, [B, L, …]
        self._before_BLD: Tensor | None = None
        self.noise: float | None = None

    def due(self, step: int) -> bool:
        """Is the update that makes `step` to be probed? The first of a process is; none is if every_steps is 0."""
        every, first, self._first = self.interval.every_steps, self._first, False
        return every != 0 and (first or (every is not None and step % every == 0))

    def finished(self, step_seconds: float) -> str:
        """An update is made, and took so long without the probe; collective. Returns the interval in words when it has
        been settled by this, else nothing."""
        settled = self.interval.finished(step_seconds, self.seconds, self.tokens_BL.device)
        return self.interval.words() if settled else ""

    @torch.no_grad()
    def before(self) -> None:
        """The function as it is ahead of an update."""
        self._load_masters()
        if self.model is not None:
            self._before_BLD = self.model(*self.inputs)
            if self.noise is None:
                self.noise = self._rounding_noise(self._before_BLD)

    @torch.no_grad()
    def after(self) -> dict[str, Any]:
        """{model_update, model_update_noise, model_update_is_noise, logit_rms, logit_max, and lists of one number a
        layer: attention_entropy, …} on rank 0, {} elsewhere. Keys are those of series.PROBE and PROBE_LAYERED."""
        began = time.perf_counter()
        self._load_masters()
        if self.model is None or self._before_BLD is None:
            return {}
        seen: dict[str, list[Tensor]] = defaultdict(list)
        layers: Any = self.model.encoder.layers
        hooks = [hook for layer in layers for hook in self._watch(layer, seen)]
        after_BLD = self.model(*self.inputs)
        for hook in hooks:
            hook.remove()
        update = self._rms_of_change(after_BLD, self._before_BLD)
        logits_NV = self.model.logits(after_BLD[self.document_BL > 0][:LOGIT_POSITIONS])
        logits_NV = logits_NV - logits_NV.mean(-1, keepdim=True)
        self._before_BLD = None
        whole = [update, logits_NV.square().mean().sqrt(), logits_NV.max()]
        names = list(seen)
        flat = torch.cat([torch.stack(whole), *(torch.stack(seen[name]) for name in names)]).tolist()
        record: dict[str, Any] = dict(zip(("model_update", "logit_rms", "logit_max"), flat, strict=False))
        position = len(whole)
        for name in names:
            record[name] = flat[position : position + len(seen[name])]
            position += len(seen[name])
        self.seconds = 2.0 * (
            time.perf_counter() - began
        )  # `before` has as much to do, but for its first noise
        noise = self.noise or 0.0
        is_noise = record["model_update"] < NOISE_FACTOR * noise
        return record | {"model_update_noise": noise, "model_update_is_noise": is_noise}

    def _watch(self, layer: Any, seen: dict[str, list[Tensor]]) -> list[Any]:
        """Hooks on one layer that append its numbers, 0-dimensional tensors, to `seen`."""
        real_BL = self.document_BL > 0
        branches = itertools.cycle(("mixer",) if layer.feed_forward is None else ("mixer", "feed_forward"))

        def entropy(mixer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            visible = keywords["visible"]
            spread_BHLL = mixer.attention(arguments[0], visible)
            if spread_BHLL is None:  # squared scores and linear attention have no entropy
                return
            entropy_BHL = -torch.special.xlogy(spread_BHLL, spread_BHLL).sum(-1)
            seen["attention_entropy"].append(entropy_BHL.mean(1)[real_BL].mean())

        def joined(module: Any, arguments: tuple[Any, ...]) -> None:
            x_BLD, change_BLD, _, ramp, scale = arguments
            weight = (
                scale.abs().squeeze()
                if scale is not None
                else ramp
                if module.ramp and ramp is not None
                else 1.0
            )
            stream = module.alpha * x_BLD[real_BL].norm() / weight
            seen[f"{next(branches)}_branch_share"].append(change_BLD[real_BL].norm() / stream)

        def units(module: Any, arguments: tuple[Any, ...]) -> None:
            inner_NE = arguments[0][real_BL].abs()
            idle_E = inner_NE.amax(0) < DEAD_UNIT * inner_NE.square().mean().sqrt()
            seen["dead_units_share"].append(idle_E.float().mean())

        def whole(module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
            before_ND, after_ND = arguments[0][real_BL], output[real_BL]
            seen["activation_rms"].append(after_ND.square().mean().sqrt())
            seen["relative_change"].append((after_ND - before_ND).norm() / before_ND.norm())

        hooks = [
            layer.mixer.register_forward_pre_hook(entropy, with_kwargs=True),
            layer.residual.register_forward_pre_hook(joined),
            layer.register_forward_hook(whole),
        ]
        last = layer.mixer.output if layer.feed_forward is None else layer.feed_forward.down
        return [*hooks, last.register_forward_pre_hook(units)]

    def _rms_of_change(self, after_BLD: Tensor, before_BLD: Tensor) -> Tensor:
        return (after_BLD - before_BLD)[self.document_BL > 0].square().mean().sqrt()

    def _rounding_noise(self, exact_BLD: Tensor) -> float:
        """RMS change of the output when every weight moves at random by up to a unit in its last place.

        Leaves the probe's model moved: whoever needs it next loads the masters first."""
        assert self.model is not None
        device = self.tokens_BL.device
        generator = torch.Generator(device).manual_seed(0)
        unit = torch.finfo(torch.float32).eps
        for weight in self.model.parameters():
            draw = torch.rand(weight.shape, generator=generator, device=device)
            weight.add_(weight * (2.0 * draw - 1.0), alpha=unit)
        return float(self._rms_of_change(self.model(*self.inputs), exact_BLD))

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
