"""What this machine's CPU multiplies matrices of 16 bits with: which way to compute is the fastest hangs on it.

Asked of the processor's instructions and never measured, so that a run computes the same when it goes on.
"""

from functools import cache
from typing import Literal

import torch

Bf16Units = Literal["none", "vectors", "tiles"]
"""vectors: AVX512-BF16 (AMD since Zen 4), tiles: AMX (Intel since Sapphire Rapids)."""


@cache
def bf16_units() -> Bf16Units:
    # Private names, and asked for with care: exported models run on any torch.
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return "tiles"
    return "vectors" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "none"
