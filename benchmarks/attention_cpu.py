"""Forward and backward of attention on a CPU: torch's fused kernel against plain matrix products.

`python benchmarks/attention_cpu.py` prints a table and writes benchmarks/results/attention_cpu.json. It is the reason
for the two ways in sutrain/models/attention.py. Runs alternate, so both meet the same machine; one thread, as a rank on
two cores has. Each value is the time of the fused kernel divided by that of plain products (above 1: plain is faster).
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import describe_run, write_results

B, H, K = 16, 4, 64
ROUNDS = 15
OUTPUT = Path(__file__).parent / "results/attention_cpu.json"


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(query * K**-0.5, key.transpose(-1, -2)) + mask
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype), value)


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def seconds(attention, length: int, dtype: torch.dtype) -> float:
    inputs = [torch.randn(B, H, length, K).to(dtype).requires_grad_() for _ in range(3)]
    mask = torch.zeros(B, 1, length, length, dtype=dtype)
    start = time.perf_counter()
    attention(*inputs, mask).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    results = []
    print(f"{'dtype':<10}{'tokens':>8}{'fused ms':>12}{'plain ms':>12}{'fused / plain':>16}")
    for dtype in (torch.bfloat16, torch.float32):
        for length in (64, 128, 256, 512):
            for attention in (fused, plain):
                seconds(attention, length, dtype)
            pairs = [(seconds(fused, length, dtype), seconds(plain, length, dtype)) for _ in range(ROUNDS)]
            one, other = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
            kind = str(dtype).removeprefix("torch.")
            print(f"{kind:<10}{length:>8}{one:>12.1f}{other:>12.1f}{one / other:>16.2f}")
            name = f"fused_vs_plain_{kind}_{length}"
            results.append(
                {"name": name, "value": round(one / other, 3), "unit": "ratio", "goal": None, "better": None}
            )
    write_results(OUTPUT, describe_run("python benchmarks/attention_cpu.py") | {"results": results})


if __name__ == "__main__":
    main()
