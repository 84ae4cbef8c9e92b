"""On a CPU: torch's fused attention against our products, and rows taken apart into documents against rows as they are.

`python benchmarks/attention_cpu.py` (three minutes) prints two tables and writes benchmarks/results/attention_cpu.json.
It is the reason for the thresholds in sutrain/models/attention.py and the costs in documents.py, which go by what
instructions a processor has for bf16 (processor.py): a new kind of processor needs a new run.

Everything is forward and backward, 2,048 tokens a batch, all threads; contenders take turns in a random order, and a
value is the median over rounds of one ÷ the other. `fused_vs_products_…` above 1: products are faster, with their
scores kept for the backward pass or made again in it. `documents_vs_rows_…` is of two layers of RoFormerV2 or two units
of GAU-alpha, below 1 where taking apart pays; `counted` is what documents.py thinks of it here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.model import SHAPES, paired
from benchmarks.model_peers import gau, make_batch, ours
from benchmarks.optimizer import take_turns
from benchmarks.results import describe_run, write_results
from sutrain.models import documents
from sutrain.models import encoder as encoder_module
from sutrain.models.processor import bf16_units
from sutrain.models.products import attend_by_products

TOKENS, HEADS, SIZE = 2048, 12, 64
LENGTHS = (64, 128, 256, 512, 1024, 2048)
ROW_LENGTHS = (64, 128, 256, 512, 1024)
OUTPUT = Path(__file__).parent / "results/attention_cpu.json"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def products(keep: bool) -> Attend:
    """Ours, with the scores kept or made again."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_by_products(query, key, value, [query.shape[2]], [None], squared=False, keep=keep)

    return attend


def kernels(dtype: torch.dtype, length: int, rounds: int) -> Iterator[dict[str, Any]]:
    """The fused kernel against both kinds of products, heads of rows that are one document."""
    shape = TOKENS // length, length, HEADS, SIZE
    inputs = [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]

    def step(attend: Attend) -> Callable[[], None]:
        return lambda: attend(*inputs).sum().backward()

    ways = {"fused": fused, "kept": products(keep=True), "again": products(keep=False)}
    seconds = take_turns({name: step(attend) for name, attend in ways.items()}, rounds, lambda: None)
    milliseconds = (statistics.median(seconds[name]) * 1e3 for name in ways)
    print(f"{_name(dtype):<10}{length:>7}" + "".join(f"{value:>9.1f}" for value in milliseconds), flush=True)
    for way in ("kept", "again"):
        name = f"fused_vs_products_{way}_{_name(dtype)}_{length}"
        yield paired(name, seconds["fused"], seconds[way])


def rows_apart(shape: str, mixer: str, layout: str, length: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Documents one by one against the rows they are in, bf16."""
    config = replace(SHAPES[shape], max_row_tokens=length, num_layers=1 if mixer == "gau" else 2)
    rows = max(2, TOKENS // length)
    batch = make_batch(layout, rows, length, config.vocab_size, torch.device("cpu"))
    torch.manual_seed(0)
    contender = (gau if mixer == "gau" else ours)(config)
    contender.model.bfloat16().train()

    def step(apart: bool) -> Callable[[], None]:
        def run() -> None:
            contender.model.zero_grad()
            with mock.patch.object(encoder_module, "worthwhile", lambda *_: apart):
                # Of all tokens, as layers are that are not the last.
                contender.model(batch.tokens_BL, batch.document_BL).sum().backward()

        return run

    seconds = take_turns({"rows": step(False), "documents": step(True)}, rounds, lambda: None)
    found = documents.find_documents(batch.document_BL)
    assert found is not None
    costs = documents.costs(torch.bfloat16)
    counted = documents.share_of_rows(found, rows, contender.config, costs)
    name = f"documents_vs_rows_{mixer}_{shape}_{layout}_{length}"
    value = paired(name, seconds["documents"], seconds["rows"], note=f"counted: {counted:.2f}")
    print(f"{mixer:<9}{shape:<7}{layout:<8}{length:>6}{value['value']:>12.3f}{counted:>10.3f}", flush=True)
    yield value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--rounds", type=int, default=7, help="of each contender (7)")
    parser.add_argument("--quick", action="store_true", help="the shortest rows alone: does it run?")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    print(f"instructions for bf16: {bf16_units()}\n\nms{'tokens':>15}{'fused':>9}{'kept':>9}{'again':>9}")
    for dtype in (torch.bfloat16, torch.float32):
        for length in LENGTHS[:1] if options.quick else LENGTHS:
            results += kernels(dtype, length, options.rounds)
    print(f"\ndocuments ÷ rows{'tokens':>14}{'measured':>12}{'counted':>10}")
    for mixer in ("roformer", "gau"):
        for shape in ("quick",) if options.quick else ("base", "small"):
            for length in ROW_LENGTHS[:1] if options.quick else ROW_LENGTHS:
                for layout in ("packed", "padded"):
                    results += rows_apart(shape, mixer, layout, length, options.rounds)
    command = f"python benchmarks/attention_cpu.py --rounds {options.rounds}"
    run = describe_run(command) | {"instructions": bf16_units(), "results": results}
    write_results(options.output, run)


if __name__ == "__main__":
    main()
