"""Rotary positions (RoPE, kexue.fm/archives/8265), in the interleaved layout of RoFormer or the half-split one.

B batch, L sequence length, H heads, K rotary size (a head's size, or a GAU's key size). The pair (x_2i,
x_2i+1) at position p is turned by the angle p * base^(-2i/K), so that the product of a query at i and a key
at j depends on i - j only. Hence it does not matter that the positions of a packed row run on across
documents instead of starting again at each: inside a document only differences are seen, and across documents
nothing is.
"""

import sys
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Turns(NamedTuple):
    """The angle of every position and pair, [L, K/2]: real parts for compilers, which know no complex numbers."""

    cos: Tensor  # fp32
    sin: Tensor
    complex: Tensor  # cos + i sin, complex64

    def at(self, places: slice | Tensor) -> "Turns":
        """Those of these positions."""
        return Turns(*(x[places] for x in self))


def _table(length: int, size: int, base: float, device: torch.device) -> Turns:
    with torch.inference_mode(False):  # a cached inference tensor could never serve in training again
        exponent = torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / -size
        angle = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), base**exponent)
        cos, sin = torch.stack((angle.cos(), angle.sin())).to(device, torch.float32)
        return Turns(cos, sin, torch.complex(cos, sin))


_cached_table = lru_cache(maxsize=16)(_table)


def rotary_table(length: int, size: int, base: float, device: torch.device) -> Turns:
    """The angles of `length` positions for features of `size`.

    A function of its arguments, cached outside the module on purpose: a buffer would be rounded by a cast of
    the model to bf16 and lost by construction on the meta device. Angles are formed in fp64, because the
    rounding of a large fp32 angle would make scores depend on the position itself.
    """
    whole = 1 << max(length - 1, 127).bit_length()  # a few sizes, not one per batch
    # A program that is being recorded (torch.export) has stand-ins for tensors, which nobody else must find.
    table = _table if torch.compiler.is_compiling() else _cached_table
    return table(whole, size, base, device).at(slice(length))


def rotate(x_BLHK: Tensor, turns: Turns | None, half: bool = False) -> Tensor:
    """Turn the pairs of `x_BLHK` by the angles of its L positions, in fp32; the dtype comes back.

    Without angles nothing is turned. `half` pairs feature i with i + K/2, as most decoders outside the RoFormer
    family do: their weights are these with the rows of query and key in another order.
    """
    if turns is None:
        return x_BLHK
    cos, sin, both = (x.unsqueeze(-2) for x in turns)  # the same angles for all heads
    compiling, on_cpu = torch.compiler.is_compiling(), x_BLHK.device.type == "cpu"
    if compiling and on_cpu and x_BLHK.dtype == torch.bfloat16 and not half and sys.byteorder == "little":
        return _Packed.apply(x_BLHK, cos, sin)
    pairs = (
        x_BLHK.float().unflatten(-1, (2, -1)).transpose(-1, -2)
        if half
        else x_BLHK.float().unflatten(-1, (-1, 2))
    )
    # The complex product is one pass, the other seven: four times as fast on a CPU, and on a GPU less than half of the
    # bytes. Compilers fuse the other.
    plain = x_BLHK.device.type in ("cpu", "cuda") and not compiling
    turned = turn_complex(pairs, both) if plain else turn_real(pairs, cos, sin)
    return (turned.transpose(-1, -2) if half else turned).flatten(-2).to(x_BLHK.dtype)


def turn_complex(pairs: Tensor, turns: Tensor) -> Tensor:
    """Pairs [..., 2] times complex [...], as complex numbers."""
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)


def turn_real(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in real arithmetic."""
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


class _Packed(torch.autograd.Function):
    """`turn_real` to the bit, of pairs of bf16 that are read and written as one number of 32 bits. Of that torch's
    compiler makes a CPU's vector instructions, and none of a loop over every second feature."""

    @staticmethod
    def forward(ctx: Any, x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn_packed(x_BLHK, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn_packed(gradients[0], cos, -sin), None, None


def turn_packed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours in the last axis of a bf16 tensor, turned. The first of a pair has to be in the lower half of
    a number, as it is where bytes are in little-endian order."""
    packed = (x if x.stride(-1) == 1 else x.contiguous()).view(torch.int32)
    even, odd = (packed << 16).view(torch.float32), (packed & -65536).view(torch.float32)
    low, high = _round_to_bf16(even * cos - odd * sin), _round_to_bf16(odd * cos + even * sin)
    return ((low >> 16) & 65535 | high & -65536).view(torch.bfloat16)


def _round_to_bf16(x: Tensor) -> Tensor:
    """To the nearest, of two as near to the even one, as conversion does; the bits are the upper 16 of int32."""
    bits = x.view(torch.int32)
    return bits + 32767 + ((bits >> 16) & 1)
