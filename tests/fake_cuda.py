"""Training steps on tensors of device "cuda" that have no memory: `python -m tests.fake_cuda [LIBRARY]` runs every case
and prints what it saw, as JSON.

torch's FakeTensorMode knows shapes, dtypes and devices and no values, so it runs what a GPU would run without one, and
refuses to mix devices. Of integers and bools the values are known here all the same: beside each lies its twin on the
CPU, so that a step may ask for how many positions are predicted, and it is seen that it asked. LIBRARY is
fake_cuda.cpp, compiled, which a torch without CUDA needs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and len(sys.argv) > 1:  # before torch asks for the first time whether there is CUDA
    _LIBRARIES = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    ctypes.CDLL(str(_LIBRARIES / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(sys.argv[1])

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "configs/pretrain").glob("*.yaml"))
CUDA = torch.device("cuda", 0)
H200 = (9, 0)
"""Compute capability."""


class Case(NamedTuple):
    """A step of the first layers of a shipped model, in bf16."""

    config: str
    dropout: float = 0.0
    layout: str = "packed"  # or padded
    again: int = 0  # layers computed again in the backward pass
    tokens: int = 64  # of a row
    layers: int = 1
    training: bool = True
    residual: str = ""  # in place of the shipped one

    def __str__(self) -> str:
        made = f"{self.layout} {self.tokens}, dropout {self.dropout}, {self.again} of {self.layers} again"
        return f"{self.config}{self.residual and ', ' + self.residual}: {made}{'' if self.training else ', evaluated'}"


BASE = "roformer_v2_base"
STEPS = [case for name in SHIPPED for case in (Case(name), Case(name, 0.1, "padded", 1))]
STEPS += [Case(BASE, 0.1, training=False), Case(BASE, residual="ramp")]
LONG = [
    Case(name, dropout, "packed", again, tokens=1024)
    for name in ("gau_alpha_base", "flash_base")
    for dropout, again in ((0.0, 0), (0.1, 1))
]
TRAFFIC = {dropout: [Case(BASE, dropout, layers=layers) for layers in (1, 2)] for dropout in (0.0, 0.1)}
SETTINGS: dict[str, dict[str, Any]] = {
    "adafactor": {"momentum": 0.9, "weight_decay": 0.01, "clip_global_norm": 0.5},
    "lamb": {"weight_decay": 0.01, "update_guard": 3.0, "guard_window": 1},
    "adamw": {"weight_decay": 0.01, "clip_global_norm": 0.5, "update_guard": 3.0, "guard_window": 1},
    "egd": {"weight_decay": 0.01},
}
"""Of the optimizers, each with two updates."""


class Watch(TorchDispatchMode):
    """Sees every kernel, what the host waits for, and what is copied between devices.

    waits: Counter of "FILE:FUNCTION" where the host asked for a value. copies: the same, of tensors made on the CPU or
    moved from one device to another. moved: bytes that all kernels read and write but matrix products and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.twins = WeakTensorKeyDictionary()
        self.begin()

    def begin(self) -> None:
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.kernels = self.moved = 0
        self._asking = ""

    def give(self, real: torch.Tensor, device: torch.device = CUDA) -> torch.Tensor:
        """The tensor on the device, its values known."""
        fake = torch.ops.aten.empty.memory_format(list(real.shape), dtype=real.dtype, device=device)
        self.twins[fake] = real
        return fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        real = self._values(func, args, kwargs, inputs)
        name = func._schema.name.split("::")[1]
        unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        if unknown_size or name in ("nonzero", "_local_scalar_dense", "unique_consecutive", "_unique2"):
            if inputs[0].device.type != "cpu" and name != self._asking:
                self.waits[_where()] += 1
            # A list is read number by number.
            self._asking = name if name == "_local_scalar_dense" else ""
            if name == "_local_scalar_dense":
                return 1.0 if real is None else real
            return tree_map_only(torch.Tensor, lambda x: self.give(x, inputs[0].device), real)
        found = func(*args, **kwargs)
        if name == "lift_fresh":  # a tensor made of a list
            real = args[0]
        outputs = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        # A kernel may take a single number from the CPU: it becomes an argument.
        here = [x.device.type for x in (*inputs, *outputs) if x.dim() or name == "_to_copy"]
        if "cpu" in here:
            self.copies[_where()] += 1
        if real is not None:
            self.twins.update(zip(outputs, tree_leaves(real), strict=True))
        if (
            func.namespace != "prim"
            and not func.is_view
            and not name.startswith(("empty", "new_empty", "detach"))
        ):
            self._asking = ""
            self.kernels += 1
            product = (
                name in ("mm", "addmm", "bmm", "baddbmm", "addmm_") or "attention" in name or "attn" in name
            )
            self.moved += 0 if product else sum({id(x): _bytes(x) for x in (*inputs, *outputs)}.values())
        return found

    def _values(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        """What comes out, where the values of all that goes in are known, else None."""
        exact = kwargs.get("dtype") in (torch.int64, torch.int32, torch.bool) or "arange" in func._schema.name
        if func.namespace != "aten" or not (inputs or exact) or not all(x in self.twins for x in inputs):
            return None
        args, kwargs = tree_map_only(torch.Tensor, self.twins.__getitem__, (args, dict(kwargs)))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _bytes(x: torch.Tensor) -> int:
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * x.element_size()


def _where() -> str:
    """The innermost line of sutrain's: its file and function."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "sutrain" in path.parts:
            return f"{path.name}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


# ---- kernels that a GPU has and a CPU has not ----------------------------------------------------------------


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """The fused kernel that takes a mask."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    inputs = q, k, v, attn_mask, True, dropout_p, is_causal
    return torch.ops.aten._scaled_dot_product_efficient_attention(*inputs, scale=scale)[0]


_NORM = torch.library.Library("fake_cuda", "DEF")
_NORM.define("rms(Tensor x) -> (Tensor, Tensor)")
_NORM.define("rms_backward(Tensor g, Tensor x, Tensor inverse) -> Tensor")


class _RmsNorm(torch.autograd.Function):
    """Of the reads and writes of the fused kernel; the numbers are nobody's concern here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y, inverse = torch.ops.fake_cuda.rms(x)
        ctx.save_for_backward(x, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return torch.ops.fake_cuda.rms_backward(gradients[0], *ctx.saved_tensors)


def _rms_norm(x, shape, weight=None, eps=None):
    y = _RmsNorm.apply(x)
    return y if weight is None else y * weight


def pretend() -> None:
    """That this machine has an H200."""
    torch.cuda.get_device_capability = lambda device=None: H200
    F.scaled_dot_product_attention, F.rms_norm = _attention, _rms_norm
    torch.nn.init.trunc_normal_ = lambda tensor, **settings: tensor  # it looks at its values
    fake = torch.library.register_fake
    fake("fake_cuda::rms", lambda x: (x.clone(), x.new_empty(x.shape[:-1], dtype=torch.float32)), lib=_NORM)
    fake("fake_cuda::rms_backward", lambda g, x, inverse: x.clone(), lib=_NORM)


# ---- what is run ---------------------------------------------------------------------------------------------


def batch(case: Case, vocab_size: int) -> list[torch.Tensor]:
    """Tokens, documents, labels and what is hidden, on the CPU: two rows, of three documents or ending in padding."""
    torch.manual_seed(0)
    shape = (2, case.tokens)
    tokens_BL, document_BL = torch.randint(5, vocab_size, shape), torch.ones(shape, dtype=torch.long)
    third = case.tokens // 3
    if case.layout == "packed":
        document_BL[:, third:] = 2
        document_BL[1, 2 * third :] = 3
    else:
        document_BL[1, third:] = 0
    labels_BL = torch.where((torch.rand(shape) < 0.15) & (document_BL > 0), tokens_BL, -100)
    return [tokens_BL, document_BL, labels_BL, labels_BL != -100]


def run_step(case: Case, mode: FakeTensorMode) -> dict[str, Any]:
    """One micro-batch, forward and backward."""
    from dataclasses import replace

    from data_prep.config_file import load_config
    from sutrain.config import PretrainConfig
    from sutrain.objectives.training_model import TrainingModel

    config = load_config(PretrainConfig, ROOT / f"configs/pretrain/{case.config}.yaml", []).model
    config = replace(
        config, num_layers=case.layers, vocab_size=min(config.vocab_size, 12000), hidden_dropout=case.dropout,
        attention_dropout=case.dropout, max_row_tokens=max(case.tokens, config.max_row_tokens),
    )  # fmt: skip
    if case.residual:
        config = replace(config, residual=case.residual, ramp_steps=10)
    real = batch(case, config.vocab_size)
    with mode, Watch() as watch:
        torch.set_default_dtype(torch.bfloat16)
        model = TrainingModel.on(CUDA, config).train(case.training)
        torch.set_default_dtype(torch.float32)
        model.encoder.recompute_layers = case.again
        tokens_BL, document_BL, labels_BL, hidden_BL = map(watch.give, real)
        watch.begin()
        with torch.set_grad_enabled(case.training):
            found = model(tokens_BL, document_BL, labels_BL=labels_BL, hidden_BL=hidden_BL)
        wrong = []
        if case.training:
            found.loss_sum.backward()
            kinds = {name: (p.grad.device, p.grad.dtype) for name, p in model.named_parameters()}
            wrong = [f"{name}: {kind}" for name, kind in kinds.items() if kind != (CUDA, torch.bfloat16)]
        return _seen(watch) | {"wrong": wrong, "tokens": tokens_BL.numel()}


def run_optimizer(name: str, mode: FakeTensorMode) -> dict[str, Any]:
    """The second of two updates of fp32 masters: what is read once is not seen."""
    from sutrain.optim import FragmentMap, build_optimizer

    with mode, Watch() as watch:
        shapes = {"matrix": (48, 32), "stack": (2, 16, 32), "vector": (48,)}
        parameters = {key: torch.nn.Parameter(torch.empty(s, device=CUDA)) for key, s in shapes.items()}
        optimizer = build_optimizer(name, parameters.items(), learning_rate=0.1, **SETTINGS[name])
        optimizer.attach(FragmentMap.whole(parameters.items()))
        for _ in range(2):
            for parameter in parameters.values():
                parameter.grad = torch.empty_like(parameter)
            watch.begin()
            optimizer.step()
        return _seen(watch) | {"wrong": [] if optimizer.updates == 2 else ["no update was made"]}


def _seen(watch: Watch) -> dict[str, Any]:
    return {
        "waits": watch.waits,
        "copies": watch.copies,
        "kernels": watch.kernels,
        "moved": watch.moved,
    }


def main() -> None:
    pretend()
    mode, found = FakeTensorMode(allow_non_fake_inputs=False), {}
    runs: list[tuple[str, Any, Any]] = [
        (str(case), run_step, case) for case in (*STEPS, *LONG, *TRAFFIC[0.0], *TRAFFIC[0.1])
    ]
    runs += [(name, run_optimizer, name) for name in SETTINGS]
    for key, run, case in runs:
        try:
            found[key] = run(case, mode)
        except Exception:
            found[key] = {"error": traceback.format_exc()}
            torch.set_default_dtype(torch.float32)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
