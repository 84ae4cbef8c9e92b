"""What an update costs: ours against torch's and DeepSpeed's, on the same shapes, gradients and machine.

`python benchmarks/optimizer.py` (about half an hour on two cores) prints tables and writes
benchmarks/results/optimizer.json; `--updates 5` for a look, `--model` and `--zero` for a part, which replaces that part
of the file. Two models: RoFormerV2 base (74 tensors), and an encoder of 1000 layers of width 64 (6002 tensors). The
contenders take turns, update by update in a random order, so that all of them meet the same machine; a value is the
median over updates of ours ÷ theirs, with the 95 % interval of 10,000 bootstrap samples. ZeRO 0 is one process with all
threads; ZeRO 1 two processes of one thread with a DeepSpeed engine and gloo, where the others get the same slices.

The floor, in bytes of memory traffic per fp32 parameter: AdamW reads g, θ, m, v and writes θ, m, v: 28. AdaFactor reads
g for its row and column sums, g again for the size of the update, which cannot be known before the sums are, and g and
θ to write θ: 20. Σθ² for the parameter scale and ΣUθ for the exact norm of the update are another 4, taken in the
second pass: 24 as run here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import write_results
from sutrain import precision
from sutrain.build_extension import build_extension, prepare_environment, start_communication
from sutrain.engine import DTYPES
from sutrain.launch import environment
from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.objectives.masked_lm import masked_lm_loss
from sutrain.optim import FragmentMap, build_optimizer

OUTPUT = Path(__file__).parent / "results/optimizer.json"
COMMAND = "python benchmarks/optimizer.py"
DEEP = {"hidden_size": 64, "num_layers": 1000, "num_heads": 1, "head_size": 64, "feed_forward_size": 256}
MODELS = {
    "RoFormerV2 base": EncoderConfig(),
    "1000 layers": EncoderConfig(vocab_size=1000, **DEEP),
}
OURS, BARE, TORCH_ADAMW = "sutrain adafactor", "sutrain adafactor, statistics off", "torch AdamW fused"
TRITON = "sutrain adafactor, triton"  # on a GPU, where kernels: auto means eager
TORCH_ADAFACTOR, CPU_ADAM = "torch Adafactor foreach", "DeepSpeed CPUAdam"
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.01}
Step = Callable[[], Any]


def ours(parameters: dict[str, nn.Parameter], name: str = "adafactor", **settings: Any) -> Any:
    optimizer = build_optimizer(name, parameters.items(), **SETTINGS, **settings)
    optimizer.attach(FragmentMap.whole(parameters.items()))
    return optimizer


def deepspeed_adam(parameters: dict[str, nn.Parameter]) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(list(parameters.values()), lr=1e-3, weight_decay=0.01)


CONTENDERS: dict[str, Callable[[dict[str, nn.Parameter]], Any]] = {
    OURS: ours,
    BARE: lambda p: ours(p, statistics=False),
    TORCH_ADAMW: lambda p: torch.optim.AdamW(p.values(), lr=1e-3, weight_decay=0.01, fused=True),
    TORCH_ADAFACTOR: lambda p: torch.optim.Adafactor(p.values(), lr=1e-3, weight_decay=0.01, foreach=True),
    CPU_ADAM: deepspeed_adam,
}
GPU_CONTENDERS = CONTENDERS | {TRITON: lambda p: ours(p, kernels="triton")}


def take_turns(steps: dict[str, Step], updates: int, wait: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of every update of every contender, until all is done that it began; two more come first and are not
    counted. wait: for the device, or for the other rank: what one of them waits for in an all-reduce is no cost."""
    order, seconds = random.Random(0), {name: [] for name in steps}
    for number in range(updates + 2):
        names = list(steps)
        order.shuffle(names)
        for name in names:
            wait()
            started = time.perf_counter()
            steps[name]()
            wait()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval."""
    sample = np.asarray(values)
    draws = np.random.default_rng(0).integers(len(sample), size=(10_000, len(sample)))
    low, high = np.percentile(np.median(sample[draws], axis=1), [2.5, 97.5])
    return float(np.median(sample)), float(low), float(high)


def ratios(seconds: dict[str, list[float]], name: str, to: str) -> list[float]:
    return [a / b for a, b in zip(seconds[name], seconds[to], strict=False)]


def print_table(title: str, seconds: dict[str, list[float]]) -> None:
    print(f"\n{title}\n{'':<36}{'updates':>8}{'ms':>10}{'÷ AdamW fused':>16}{'95 % interval':>20}")
    for name, times in seconds.items():
        middle, low, high = interval(ratios(seconds, name, TORCH_ADAMW))
        milliseconds = statistics.median(times) * 1e3
        print(
            f"{name:<36}{len(times):>8}{milliseconds:>10.1f}{middle:>16.2f}{f'{low:.2f} .. {high:.2f}':>20}"
        )


def in_a_process_of_its_own(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """This program again, for one measurement: what one has allocated shall not burden the next."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True)


def last_line(child: subprocess.Popen) -> dict[str, Any]:
    """The JSON a measurement ends with; what it says before is passed on."""
    output = child.communicate()[0].splitlines()
    if child.returncode:
        sys.exit(f"error: a measurement failed: {child.args}")
    print("\n".join(output[:-1]), flush=True)
    return json.loads(output[-1])


def one_process(model: str, updates: int, device: torch.device) -> None:
    """ZeRO 0: every contender on a copy of the model, all with the same gradients. Prints a line of JSON."""
    torch.manual_seed(0)
    shapes = {n: p.shape for n, p in MaskedLanguageModel(MODELS[model]).named_parameters()}
    gradients = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    steps: dict[str, Step] = {}
    for name, build in (CONTENDERS if device.type == "cpu" else GPU_CONTENDERS).items():
        parameters = {n: nn.Parameter(torch.randn(s, device=device) * 0.02) for n, s in shapes.items()}
        for key, parameter in parameters.items():
            parameter.grad = gradients[key]
        try:
            optimizer = build(parameters)
            optimizer.step()  # DeepSpeed's CPUAdam is built for a GPU's tensors too, and stumbles here
        except Exception as error:
            print(f"{name}: left out, it cannot run here ({' '.join(str(error).split())[:100]})")
            continue
        steps[name] = optimizer.step
        if name == OURS:
            state = state_bytes(optimizer)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = take_turns(steps, updates, wait)
    print_table(f"{model}, {len(shapes)} tensors, ZeRO 0, {device.type}", seconds)
    parameters_in_all = sum(shape.numel() for shape in shapes.values())
    print(json.dumps({"seconds": seconds, "parameters": parameters_in_all, "state_bytes": state}))


def training_pass_seconds() -> float:
    """Forward and backward of RoFormerV2 base, in the precision that is fast here, over 2 rows of 512 tokens: less than
    any real batch has, so that what the optimizer costs weighs more than it ever will."""
    model = MaskedLanguageModel(MODELS["RoFormerV2 base"]).to(DTYPES[precision.resolve("auto")])
    tokens = torch.randint(5, 12000, (2, 512))
    predicted = torch.rand(2, 512) < 0.15
    labels = torch.where(predicted, tokens, -100)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        masked_lm_loss(
            model, model.logits, tokens, labels, predicted, torch.ones_like(tokens)
        ).loss_sum.backward()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


# ---- ZeRO 1 ------------------------------------------------------------------------------------------------


def two_processes(model: str, updates: int) -> dict[str, Any]:
    """ZeRO 1 on two ranks, one thread each; returns what rank 0 measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(2):
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        arguments = ("--part", "zero1", "--model", model, "--updates", str(updates))
        ranks.append(in_a_process_of_its_own(*arguments, environment=own))
    result, _ = last_line(ranks[0]), last_line(ranks[1])
    print_table(f"{model}, ZeRO 1, two ranks of one thread", result["seconds"])
    return result


def one_rank(model_name: str, updates: int) -> None:
    """One of the two processes; prints a line of JSON."""
    build_extension()
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    start_communication("gloo")
    model = MaskedLanguageModel(MODELS[model_name])
    optimizer = build_optimizer("adafactor", model.named_parameters(), **SETTINGS)
    bare = build_optimizer("adafactor", model.named_parameters(), statistics=False, **SETTINGS)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    fragments = FragmentMap.from_engine(engine)
    (slice_,) = fragments.buffers
    bare.param_groups[0]["params"] = [slice_]
    sent = []
    all_reduce = fragments.all_reduce
    fragments.all_reduce = lambda sums: (sent.append(sums.numel() * 4), all_reduce(sums))[1]  # type: ignore
    for ours_ in (optimizer, bare):
        ours_.attach(fragments)
    slice_.grad = torch.randn_like(slice_)
    optimizer.step()
    sent_bytes = sum(sent)
    steps: dict[str, Step] = {OURS: optimizer.step, BARE: bare.step}
    for name in (TORCH_ADAMW, TORCH_ADAFACTOR, CPU_ADAM):
        copy = nn.Parameter(slice_.detach().clone())
        copy.grad = slice_.grad
        steps[name] = CONTENDERS[name]({"slice": copy}).step
    seconds = take_turns(steps, updates, torch.distributed.barrier)
    parameters = sum(shape.numel() for shape in fragments.shapes.values())
    print(json.dumps({"seconds": seconds, "sent_bytes": sent_bytes, "parameters": parameters}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# ---- results -----------------------------------------------------------------------------------------------


def result(
    name: str,
    value: float | None,
    goal: float | None,
    bounds: tuple[float, float] | None = None,
    note: str = "",
) -> dict[str, Any]:
    rounded = None if value is None else float(f"{value:.4g}")
    found = {"name": name, "value": rounded, "unit": "ratio", "goal": goal, "better": "lower"}
    if bounds is not None:
        found["interval_95"] = [float(f"{bound:.4g}") for bound in bounds]
    return found | ({"note": note} if note else {})


def paired(
    name: str,
    seconds: dict[str, list[float]],
    to: str,
    goal: float | None,
    note: str = "",
    own: str = OURS,
) -> dict:
    for needed in (own, to):
        if needed not in seconds:
            return result(name, None, goal, note=f"{needed} cannot run here")
    middle, *bounds = interval(ratios(seconds, own, to))
    return result(name, middle, goal, tuple(bounds), note)


def statistics_share(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What the statistics add to a training step, measured where the measurement is fine enough."""
    step = training_pass_seconds() + statistics.median(seconds[OURS])
    added = [(a - b) / step for a, b in zip(seconds[OURS], seconds[BARE], strict=True)]
    middle, low, high = interval(added)
    if high - low < 0.01:
        note = f"of a step of {step:.2f} s: 2 rows of 512 tokens; statistics on and off took turns"
        return result("statistics_share", max(middle, 0.0), 0.01, (low, high), note)
    # ΣUθ: one product and one sum a parameter, beside 6 FLOPs a parameter and token of the passes over the model.
    return result(
        "statistics_share", 2 / (6 * 1024), 0.01, note="FLOPs: the measured interval is wider than the goal"
    )


def state_bytes(optimizer: Any) -> int:
    state = optimizer.state_by_name()
    return 4 * sum(v.numel() for v in [*state.replicated.values(), *(v for *_, v in state.sliced)])


def results_of(updates: int, models: Iterable[str], stages: Iterable[int]) -> Iterator[dict[str, Any]]:
    """One after the other, so that an interrupted run leaves what it has."""
    common = ("--updates", str(updates))
    if torch.cuda.is_available():
        part = in_a_process_of_its_own("--part", "cuda", "--model", "RoFormerV2 base", *common)
        seconds = last_line(part)["seconds"]
        yield paired("gpu_adafactor_vs_adamw", seconds, TORCH_ADAMW, 1.0, "kernels: triton", own=TRITON)
        yield paired("gpu_adafactor_eager_vs_adamw", seconds, TORCH_ADAMW, None)
    else:
        yield result("gpu_adafactor_vs_adamw", None, 1.0, note="not measured: no GPU here")
    for model in models:
        wide = model == "RoFormerV2 base"
        suffix = "" if wide else "_1000_layers"
        if 0 in stages:
            part = last_line(in_a_process_of_its_own("--part", "cpu", "--model", model, *common))
            seconds, parameters = part["seconds"], part["parameters"]
            yield paired(f"cpu_adafactor_vs_adamw{suffix}", seconds, TORCH_ADAMW, 2.0)
            yield paired(f"cpu_adafactor_vs_torch_adafactor{suffix}", seconds, TORCH_ADAFACTOR, 0.4)
            yield paired(f"cpu_adafactor_vs_deepspeed_cpu_adam{suffix}", seconds, CPU_ADAM, None)
            if wide:
                yield statistics_share(seconds)
            share, formula = part["state_bytes"] / (8 * parameters), "4 Σ (rows + columns) ÷ 8 parameters"
            yield result(f"state_vs_adamw{suffix}", share, 0.01 if wide else None, note=formula)
        if 1 in stages:
            zero = two_processes(model, updates)
            seconds, parameters = zero["seconds"], zero["parameters"]
            yield paired(f"cpu_adafactor_vs_adamw_zero1{suffix}", seconds, TORCH_ADAMW, 2.0)
            flat = "its slice is one vector: nothing is factored, clipped by the slice"
            yield paired(
                f"cpu_adafactor_vs_torch_adafactor_zero1{suffix}", seconds, TORCH_ADAFACTOR, None, flat
            )
            yield paired(f"cpu_adafactor_vs_deepspeed_cpu_adam_zero1{suffix}", seconds, CPU_ADAM, None)
            share = zero["sent_bytes"] / (4 * parameters)
            formula = "bytes of both all-reduces, counted while stepping, ÷ 4 parameters (fp32 gradients)"
            yield result(f"communication_vs_gradients{suffix}", share, 0.01 if wide else None, note=formula)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=200, help="of every contender (200)")
    parser.add_argument("--model", choices=tuple(MODELS), help="only this one")
    parser.add_argument("--zero", type=int, choices=(0, 1), help="only this stage")
    parser.add_argument("--part", choices=("cpu", "cuda", "zero1"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    prepare_environment()
    if options.part == "zero1":
        one_rank(options.model, options.updates)
        return
    if options.part:
        one_process(options.model, options.updates, torch.device(options.part))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = environment(1)
    machine = {key: facts[key] for key in ("processor", "cores", "python", "packages")}
    content = {"commit": commit, "machine": machine, "command": COMMAND, "updates": options.updates}
    models = [options.model] if options.model else list(MODELS)
    stages = (0, 1) if options.zero is None else (options.zero,)
    kept = {}
    if OUTPUT.exists() and (options.model or options.zero is not None):
        kept = {entry["name"]: entry for entry in json.loads(OUTPUT.read_text())["results"]}
    found = []
    for entry in results_of(options.updates, models, stages):
        found.append(entry)
        kept[entry["name"]] = entry
        write_results(OUTPUT, {**content, "results": list(kept.values())})
    print(f"\n{'result':<48}{'value':>10}{'goal':>8}  95 % interval, note")
    for entry in found:
        value = "-" if entry["value"] is None else f"{entry['value']:.4g}"
        bounds = " .. ".join(map(str, entry.get("interval_95", [])))
        goal = "-" if entry["goal"] is None else f"{entry['goal']:g}"
        print(f"{entry['name']:<48}{value:>10}{goal:>8}  {bounds} {entry.get('note', '')}")


if __name__ == "__main__":
    main()
