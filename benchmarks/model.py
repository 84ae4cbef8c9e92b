"""Training speed and memory of our models beside others of the same shape, and of deep and long ones beside themselves.

    pip install --no-deps --target build/peers x-transformers torch-einops-utils einx frozendict loguru
    python benchmarks/model.py                       # all groups, writes benchmarks/results/model.json
    python benchmarks/model.py --only peers --shape small --lengths 512 --rounds 3 --compile   # the strongest setting
    python benchmarks/model.py --quick --output build/model.json   # does it run at all? no figures to keep

Weights are bf16, dropout is off, a step is forward, masked language modelling loss, backward and an update of torch's
fused AdamW (the same for all). The trunk's time is measured within the step: the graph is cut between trunk and head,
so that the trunk's forward and backward have a clock of their own
(ours ends at the predicted positions, as in training). Contenders take turns, step by step in a random
order; a ratio is the median over rounds of one ÷ the other in the same round, with the 95 % interval of 10,000
bootstrap samples. Tokens/s count real tokens, no padding. Memory is what a step needs on top of weights and
optimizer: the bytes of all tensors where they are most; beside it, on a CPU, by how much the process's resident memory
rises, which has what glibc cannot use again as well and differs from run to run. FLOP/s are those of needed FLOPs
(model_peers.py), beside a bf16 matrix product in the same run: 8192³ on a GPU, 2048³ on a CPU.

Groups: `peers` everybody at one shape; `long` GAU-alpha against RoFormerV2 above 512 tokens; `flash` the growth of
FLASH's time over 8 times the tokens; `depth` 1000 layers against 24; `compile` every contender's layers under
torch.compile against themselves, for --compile. Peers run with torch's fused attention, or with plain attention where
that is the faster one (model_peers.py). A run replaces what the file has of the same names and keeps the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "build/peers")]

from benchmarks.model_peers import (  # noqa: E402
    BERT,
    CONTENDERS,
    GAU,
    OURS,
    Batch,
    Build,
    available,
    key,
    make_batch,
    ours,
    recomputed_flops,
)
from benchmarks.model_steps import Runner, matmul_rate, wait_for  # noqa: E402
from benchmarks.optimizer import interval, ratios, take_turns  # noqa: E402
from benchmarks.results import describe_run, write_results  # noqa: E402
from sutrain.models.configuration import EncoderConfig  # noqa: E402
from sutrain.models.encoder import Encoder  # noqa: E402
from sutrain.monitor.mfu import vendor_peak  # noqa: E402

OUTPUT = ROOT / "benchmarks/results/model.json"
_UNDROPPED = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
SHAPES = {
    "base": EncoderConfig(max_row_tokens=2048, **_UNDROPPED),
    "small": EncoderConfig(
        hidden_size=384, num_layers=6, num_heads=6, feed_forward_size=1536, max_row_tokens=2048, **_UNDROPPED
    ),
    "quick": EncoderConfig(
        vocab_size=500, hidden_size=64, num_layers=3, num_heads=2, head_size=32, feed_forward_size=192,
        max_row_tokens=256, **_UNDROPPED,
    ),
}  # fmt: skip
GOALS: dict[str, tuple[float, str]] = {
    "roformer_v2_vs_bert": (1.3, "higher"),
    "gau_vs_roformer_v2_long": (1.0, "higher"),
    "gau_vs_roformer_v2_long_memory": (1.0, "lower"),
    "flash_length_growth": (9.0, "lower"),
    "deepnet_1000_vs_flops": (1.3, "lower"),
    "gpu_matmul_share": (0.5, "higher"),
    "gpu_peak_share": (0.4, "higher"),
}


# ---- results -----------------------------------------------------------------------------------------------


def result(
    name: str,
    value: float | None,
    unit: str = "ratio",
    bounds: Sequence[float] | None = None,
    note: str = "",
) -> dict[str, Any]:
    goal, better = GOALS.get(name, (None, None))
    found = {"name": name, "value": _rounded(value), "unit": unit, "goal": goal, "better": better}
    if bounds is not None:
        found["interval_95"] = [_rounded(bound) for bound in bounds]
    return found | ({"note": note} if note else {})


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def paired(name: str, numerators: list[float], denominators: list[float], note: str = "") -> dict[str, Any]:
    """Median and interval of the ratios within a round."""
    middle, *bounds = interval(ratios({"a": numerators, "b": denominators}, "a", "b"))
    return result(name, middle, bounds=bounds, note=note)


COMPILED = ", compiled"


class Bench:
    """What the groups share: options, the rate of a matrix product, and the table of everything that ran."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.rate = matmul_rate(self.device)
        self.table: list[dict[str, Any]] = []
        threads = torch.get_num_threads()
        print(f"bf16 matrix product: {self.rate / 1e12:.3g} TFLOP/s, {threads} threads", flush=True)

    def turns(self, steps: dict[str, Any]) -> dict[str, list[float]]:
        return take_turns(dict(steps), self.options.rounds, lambda: wait_for(self.device))

    def race(
        self, title: str, builds: dict[str, Build], config: EncoderConfig, batch: Batch
    ) -> tuple[dict[str, Runner], dict[str, list[float]]]:
        """All contenders on one batch, in turns: their runners, and the seconds of whole steps."""
        runners = {}
        torch.compiler.reset()  # else shapes of earlier races count towards the limit, and who meets it is not compiled
        for name, build in builds.items():
            torch.manual_seed(0)
            compiled = name.endswith(COMPILED) or name in self.options.compile
            runners[name] = Runner(build(config), batch, compiled)
        seconds = self.turns(runners)
        documents = f"{batch.tokens} tokens in {len(batch.lengths)} documents, {batch.predicted} predicted"
        print(
            f"\n{title}: {documents}\n{'':<36}" + "".join(f"{column:>15}" for column in COLUMNS), flush=True
        )
        for name, runner in runners.items():
            step, trunk = statistics.median(seconds[name]), statistics.median(runner.trunk_seconds)
            flops = runner.contender.flops(batch) / step
            speeds = batch.tokens / trunk, batch.tokens / step
            values = *speeds, *runner.mebibytes(), flops / 1e9, flops / self.rate
            row = dict(zip(COLUMNS, map(_rounded, values), strict=True))
            shown = name + COMPILED if name in self.options.compile else name
            self.table.append({"batch": title, "model": shown} | row)
            cells = ("-" if value is None else f"{value:,.4g}" for value in row.values())
            print(f"{shown:<36}" + "".join(f"{cell:>15}" for cell in cells), flush=True)
        return runners, seconds

    def compiled(self, *names: str) -> str:
        """For a note: whose layers were compiled."""
        found = [name for name in names if name in self.options.compile]
        if not found:
            return ""
        return ", both compiled" if len(found) == len(names) else f", {found[0]} compiled"


COLUMNS = ("trunk tokens/s", "step tokens/s", "tensors MiB", "resident MiB", "GFLOP/s", "of matmul")


def rows_of(length: int, tokens: int) -> int:
    return max(2, tokens // length)


# ---- groups ------------------------------------------------------------------------------------------------


def peers(bench: Bench) -> Iterator[dict[str, Any]]:
    """RoFormerV2 against everybody, at each length, padded and packed."""
    options, config = bench.options, SHAPES[bench.options.shape]
    builds = {name: build for name, build in available().items() if name in (OURS, *options.beside)}
    for length in options.lengths:
        for layout in options.layouts:
            rows = rows_of(length, options.tokens)
            batch = make_batch(layout, rows, length, config.vocab_size, bench.device)
            runners, seconds = bench.race(f"{options.shape}, {layout} {length}", builds, config, batch)
            cell = f"{options.shape}_{layout}_{length}"
            for name in runners:
                if name not in (OURS, GAU):
                    trunks = runners[name].trunk_seconds, runners[OURS].trunk_seconds
                    how, result_name = bench.compiled(OURS, name), f"roformer_v2_vs_{key(name)}_{cell}"
                    yield paired(result_name, seconds[name], seconds[OURS], f"full step{how}")
                    yield paired(f"{result_name}_trunk", *trunks, f"trunk{how}")
            if cell == "base_packed_512":
                if BERT in builds:
                    note = "base, packed 512; BERT has scores and its last block everywhere, ours where predicted"
                    note = f"full step{bench.compiled(OURS, BERT)}, {note}"
                    yield paired("roformer_v2_vs_bert", seconds[BERT], seconds[OURS], note)
                rate = runners[OURS].contender.flops(batch) / statistics.median(seconds[OURS])
                yield from gpu_shares(bench, rate)
            del runners, seconds
            gc.collect()


def compile_gain(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every contender against itself with compiled layers, packed rows of 512."""
    options, config = bench.options, SHAPES[bench.options.shape]
    length = min(512, config.max_row_tokens)
    batch = make_batch("packed", rows_of(length, options.tokens), length, config.vocab_size, bench.device)
    for name, build in available().items():
        builds = {name: build, name + COMPILED: build}
        title = f"{options.shape}, packed {length}, compiled or not"
        _, seconds = bench.race(title, builds, config, batch)
        eager, compiled = seconds.values()
        note = f"full step, {options.shape}, packed {length}: eager ÷ compiled layers"
        yield paired(f"compile_gain_{key(name)}", eager, compiled, note)


def gpu_shares(bench: Bench, rate: float) -> Iterator[dict[str, Any]]:
    if bench.device.type != "cuda":
        for name in ("gpu_matmul_share", "gpu_peak_share"):
            yield result(name, None, note="not measured: no GPU")
        return
    known = vendor_peak(torch.cuda.get_device_name(bench.device))
    note = "needed FLOPs of a full step, base, packed 512, ÷ "
    yield result("gpu_matmul_share", rate / bench.rate, note=note + "an 8192³ bf16 product")
    if known is None:
        yield result("gpu_peak_share", None, note="not measured: no data sheet of this device")
    else:
        yield result("gpu_peak_share", rate / known.flops_per_second, note=note + known.source)


def long(bench: Bench) -> Iterator[dict[str, Any]]:
    """GAU-alpha against RoFormerV2, one document a row; a goal's value is the worse one of all lengths. Once without
    dropout, where RoFormerV2 has a fused kernel, once with that of attention as published, where a CPU has none."""
    options, config = bench.options, SHAPES[bench.options.shape]
    config = replace(config, num_layers=min(options.long_layers, config.num_layers))
    builds = {name: CONTENDERS[name] for name in (OURS, GAU)}
    for dropout, suffix in ((0.0, ""), (0.1, "_dropout")):
        speeds, memory = [], []
        for length in options.long_lengths:
            longer = replace(config, max_row_tokens=length, attention_dropout=dropout)
            rows = 1 if bench.device.type == "cpu" else rows_of(length, options.tokens)
            batch = make_batch("full", rows, length, config.vocab_size, bench.device)
            title = (
                f"{config.num_layers} x {config.hidden_size}, document of {length}{suffix.replace('_', ', ')}"
            )
            runners, seconds = bench.race(title, builds, longer, batch)
            name, how = f"gau_vs_roformer_v2_{length}{suffix}", bench.compiled(OURS, GAU)
            speeds.append(
                paired(name, seconds[OURS], seconds[GAU], f"full step{how}: RoFormerV2's time ÷ GAU's")
            )
            memory.append(runners[GAU].tensor_bytes / runners[OURS].tensor_bytes)
            yield speeds[-1]
            yield result(f"{name}_memory", memory[-1], note="of a step")
        worst = min(speeds, key=lambda entry: entry["value"])
        lengths = f"the worse of {', '.join(map(str, options.long_lengths))} tokens{how}"
        name = f"gau_vs_roformer_v2_long{suffix}"
        yield result(name, worst["value"], bounds=worst["interval_95"], note=f"full step, {lengths}")
        yield result(f"{name}_memory", max(memory), note=f"of a step, {lengths}")


def flash(bench: Bench) -> Iterator[dict[str, Any]]:
    """One document of L tokens against one of 8 L; layers only repeat, so a few of them do."""
    options, shape = bench.options, SHAPES[bench.options.shape]
    config = EncoderConfig(
        mixer="flash", vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_layers=options.flash_layers,
        gau_expansion_size=2 * shape.hidden_size, score_normaliser="relu_squared", initialisation="gau_alpha",
        max_row_tokens=8 * options.flash_tokens, **_UNDROPPED,
    )  # fmt: skip
    runners = {}
    for length in (options.flash_tokens, 8 * options.flash_tokens):
        batch = make_batch("full", 1, length, config.vocab_size, bench.device)
        runners[f"{length}"] = Runner(ours(config), batch)
    seconds = bench.turns(runners)
    short, eight = runners
    note = f"full step, one document of {short} and of {eight}, {config.num_layers} x {config.hidden_size}"
    yield paired("flash_length_growth", seconds[eight], seconds[short], note)
    growth = runners[eight].tensor_bytes / runners[short].tensor_bytes
    yield result("flash_memory_growth", growth, note="of a step")


DEEP_ROWS, DEEP_ROW_TOKENS, TOGETHER, REPEATS = 2, 128, 4, 5


def depth(bench: Bench) -> Iterator[dict[str, Any]]:
    """1000 layers and 24, all computed again four at a time: forward and backward of the trunk, as time per FLOP."""
    options, width = bench.options, bench.options.deep_width
    rows, length = DEEP_ROWS, min(DEEP_ROW_TOKENS, options.tokens)
    documents = torch.ones(rows, length, dtype=torch.long, device=bench.device)
    tokens = torch.randint(5, 1000, (rows, length), device=bench.device)
    direction = torch.randn(rows, length, width, device=bench.device, dtype=torch.bfloat16)
    steps: dict[str, Callable[[], Any]] = {}
    flops: dict[str, float] = {}
    for layers, repeats in ((24, REPEATS), (options.deep_layers, 1)):
        config = EncoderConfig(
            vocab_size=1000, hidden_size=width, num_layers=layers, num_heads=width // 32, head_size=32,
            feed_forward_size=4 * width, residual="deepnorm", initialisation="deepnorm", norm="layer_norm",
            norm_epsilon=1e-5, biases=True, fp32_residual=True, **_UNDROPPED,
        )  # fmt: skip
        encoder = Encoder(config).to(bench.device, torch.bfloat16)
        encoder.gradient_checkpointing, encoder.recompute_together = True, TOGETHER

        def step(encoder: Encoder = encoder, repeats: int = repeats) -> None:
            for _ in range(repeats):
                encoder.zero_grad()
                encoder(tokens, documents).backward(direction)

        steps[str(layers)] = step
        flops[str(layers)] = repeats * recomputed_flops(config, length) * rows * length
    seconds = bench.turns(steps)
    shallow, deep = steps
    per_flop = {name: [taken / flops[name] for taken in times] for name, times in seconds.items()}
    for name in steps:
        rate = flops[name] / statistics.median(seconds[name]) / 1e9
        print(f"{name} layers of {width}: {rate:,.0f} GFLOP/s, recomputation counted", flush=True)
    note = f"forward and backward of the trunk, width {width}, {rows} x {length} tokens, all layers computed again"
    yield paired(
        "deepnet_1000_vs_flops", per_flop[deep], per_flop[shallow], f"{deep} against {shallow} layers; {note}"
    )


# ---- the program -------------------------------------------------------------------------------------------

GROUPS = {"peers": peers, "long": long, "flash": flash, "depth": depth, "compile": compile_gain}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=tuple(GROUPS), default=list(GROUPS)[:4], help="groups (all but compile)"
    )
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), default="base", help="of groups peers, long and flash (base)"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 512, 2048], help="row lengths of group peers"
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=("padded", "packed", "full"), default=["padded", "packed"]
    )
    parser.add_argument("--tokens", type=int, help="of a batch, at least two rows (2048; on a GPU 16384)")
    parser.add_argument("--rounds", type=int, default=5, help="steps that count, of every contender (5)")
    parser.add_argument(
        "--beside", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS),
        help="whom group peers has: of two, the steps of a round are closest in time (all)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", nargs="*", choices=tuple(CONTENDERS), help="compile these layers; without a name all"
    )
    parser.add_argument("--long-lengths", type=int, nargs="+", default=[1024, 2048], help="of group long")
    for name, default, what in (
        ("long-layers", 12, "RoFormerV2's; GAU-alpha has twice as many"),
        ("flash-tokens", 1024, "the shorter document of group flash"),
        ("flash-layers", 4, "of group flash"),
        ("deep-layers", 1000, "of group depth"),
        ("deep-width", 256, "of group depth"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--quick", action="store_true", help="everything very small: does it run?")
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or (16384 if torch.device(options.device).type == "cuda" else 2048)
    options.compile = list(CONTENDERS) if options.compile == [] else options.compile or []
    if options.quick:
        small = {
            "shape": "quick", "lengths": [64], "tokens": 128, "rounds": 2, "long_lengths": [96, 128],
            "flash_tokens": 64, "flash_layers": 1, "deep_layers": 48, "deep_width": 32,
        }  # fmt: skip
        vars(options).update(small)
        if options.output == OUTPUT:
            parser.error("--quick has no figures to keep: name another --output")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    bench = Bench(options)
    command = " ".join(["python benchmarks/model.py", *(sys.argv[1:] if arguments is None else arguments)])
    earlier = json.loads(options.output.read_text()) if options.output.exists() else {}
    results = {entry["name"]: entry for entry in earlier.get("results", [])}
    rows = {(row["batch"], row["model"]): row for row in earlier.get("table", [])}
    commands = [known for known in earlier.get("commands", []) if known != command] + [command]
    for name in options.only:
        print(f"\n{name}:", flush=True)
        for entry in GROUPS[name](bench):
            results[entry["name"]] = entry
            rows |= {(row["batch"], row["model"]): row for row in bench.table}
            content = describe_run("; ".join(commands)) | {"commands": commands, "matmul_flops": bench.rate}
            found = {"results": list(results.values()), "table": list(rows.values())}
            write_results(options.output, content | found)
    print(f"\n{'result':<60}{'value':>10}{'goal':>8}  95 % interval, note")
    for entry in results.values():
        value = "-" if entry["value"] is None else f"{entry['value']:.4g}"
        goal = "" if entry["goal"] is None else f"{entry['goal']:g}"
        bounds = " .. ".join(map(str, entry.get("interval_95", [])))
        print(f"{entry['name']:<60}{value:>10}{goal:>8}  {bounds} {entry.get('note', '')}")


if __name__ == "__main__":
    main()
