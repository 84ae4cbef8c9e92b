"""One rank of the multi-process tests: real DeepSpeed engines over gloo, one after another in one process.

    python zero_worker.py OUTPUT      with the launcher's variables in the environment
writes OUTPUT/world{W}/{case}.rank{R}.npz; the tests read and judge them.
"""

import json
import logging
import os
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import deepspeed
import numpy as np
import torch

from sutrain.build_extension import build_extension, start_communication
from sutrain.engine import quicken_start
from sutrain.optim import FragmentError, FragmentMap, build_optimizer
from sutrain.optim.verification import verify_fragments
from tests.optim.problem import (
    ENGINES,
    LEARNING_RATE,
    LOGICAL,
    MOVES,
    OPTIMIZERS,
    PARAMETERS,
    PER_TENSOR,
    STEPS,
    UNUSED,
    Toy,
    cases,
    engines,
    rank_gradient,
)

RANK, WORLD_SIZE, OUTPUT = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUT = {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0, "sub_group_size": 40}
FP16 = {
    "loss_scale": 0,
    "initial_scale_power": 8,
    "loss_scale_window": 5,
    "hysteresis": 1,
    "min_loss_scale": 1,
}


def make_engine(engine_name, optimizer_of, **overrides):
    kind = ENGINES[engine_name]
    model = Toy()
    zero = {"stage": kind.stage, "stage3_gather_16bit_weights_on_model_save": False}
    zero |= CUT if kind.stage == 3 and kind.cut else {}
    zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": False}} if kind.offload else {}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": kind.precision == "bf16", "check_grad_overflow": not kind.offload},
        "fp16": {"enabled": kind.precision == "fp16", **FP16},
        "data_types": {"grad_accum_dtype": kind.accumulate},
        "zero_optimization": zero | overrides.pop("zero", {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    } | overrides
    optimizer = optimizer_of(model)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer


def ours(optimizer_name):
    kind, settings = OPTIMIZERS[optimizer_name]
    common = {"learning_rate": LEARNING_RATE, "per_tensor": PER_TENSOR, "logical_tensors": LOGICAL}
    return lambda model: build_optimizer(kind, model.named_parameters(), **common, **settings)


def update(engine, step, spoil=False):
    """One update of as many micro-batches as the engine accumulates."""
    dtype = engine.get_data_types()[0]
    micros = engine.gradient_accumulation_steps()
    for micro in range(micros):
        place = (RANK, WORLD_SIZE, micro, micros)
        coefficients = {
            name: torch.tensor(rank_gradient(step, name, *place), dtype=dtype)
            for name in PARAMETERS
            if name not in UNUSED.get(step, ())
        }
        if spoil and RANK == WORLD_SIZE - 1:
            coefficients["wide"][7, 3] = float("inf")
        engine.backward(engine(coefficients))
        engine.step()


def write(case, engine, fragments, optimizer, statistics):
    arrays = {f"master|{name}|{offset}": values.numpy() for name, offset, values in fragments.master_slices()}
    arrays |= {f"model|{name}": fragments.model_weight(name).float().numpy() for name in PARAMETERS}
    with deepspeed.zero.GatheredParameters([engine.module.frozen]):
        arrays["model|frozen"] = engine.module.frozen.detach().float().numpy().copy()
    arrays["statistics"] = np.array(statistics)
    arrays["owned"] = np.array([f"{f.name}|{f.offset}|{f.length}" for f in fragments.fragments])
    arrays["wrapper"] = np.array(type(engine.optimizer).__name__)
    arrays["buffers"] = np.array(len(fragments.buffers))
    if optimizer is not None:
        state = optimizer.state_by_name()
        arrays |= {f"replicated|{key}": value.numpy() for key, value in state.replicated.items()}
        arrays |= {f"state|{key}|{name}|{offset}": v.numpy() for key, name, offset, v in state.sliced}
        arrays["counters"] = np.array(json.dumps(state.counters))
    folder = OUTPUT / f"world{WORLD_SIZE}"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{case}.rank{RANK}.npz", **arrays)


def train(case, engine_name, optimizer_name, *, save_at=None, perturb_at=None, spoil_after=None, **overrides):
    engine, optimizer = make_engine(engine_name, ours(optimizer_name), **overrides)
    fragments = FragmentMap.from_engine(engine)
    optimizer.attach(fragments)
    statistics, scales = [], []
    for step in range(1, STEPS + 1):
        scales.append(scale(fragments))
        with counted_sums() as sums:
            update(engine, step)
        assert len(sums) == 2 * (len(fragments.buffers) if ENGINES[engine_name].stage == 3 else 1)
        statistics.append(optimizer.statistics.numpy().copy())
        if step == save_at:
            write(f"{case}.saved", engine, fragments, optimizer, statistics)
        if step == spoil_after:
            before, was = scale(fragments), optimizer.state_by_name().counters["updates"]
            update(engine, step, spoil=True)
            assert scale(fragments) == (before / 2 if fragments.around.loss_scaler else before)
            assert optimizer.state_by_name().counters["updates"] == was
        if step == perturb_at:
            optimizer.state_by_name().replicated["row_mean|wide"][3] *= 1.01
    write(case, engine, fragments, optimizer, statistics)
    if fragments.around.loss_scaler:
        assert any(b > a for a, b in pairwise(scales)), f"the loss scale did not grow: {scales}"
    engine.destroy()


@contextmanager
def counted_sums():
    """Sizes of the sums over owners that are made meanwhile: two for each call of the optimizer."""
    made, original = [], FragmentMap.all_reduce

    def counting(self, sums):
        made.append(sums.numel())
        original(self, sums)

    FragmentMap.all_reduce = counting
    try:
        yield made
    finally:
        FragmentMap.all_reduce = original


def scale(fragments):
    return fragments.around.loss_scaler.scale if fragments.around.loss_scaler else 1.0


def stock_adafactor():
    """torch.optim.Adafactor under ZeRO-1: what a user gets who just passes it to DeepSpeed."""
    engine, _ = make_engine(
        "stage1_fp32",
        lambda model: torch.optim.Adafactor(
            [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, eps=(1e-15, 1e-3)
        ),
    )
    fragments = FragmentMap.from_engine(engine)
    for step in range(1, STEPS + 1):
        update(engine, step)
    write("stock_adafactor", engine, fragments, None, [])
    engine.destroy()


def moved(case, saved, from_world, to_engine, optimizer_name, save_at):
    """Go on, here and with another engine, from what another world size saved after `save_at` updates."""
    stores = [np.load(f) for f in sorted((OUTPUT / f"world{from_world}").glob(f"{saved}.saved.rank*.npz"))]

    def read(key, name, offset, length):
        values, filled = np.full(length, np.nan, dtype=np.float32), 0
        for store in stores:
            for stored in store.files:
                if stored.rsplit("|", 1)[0] == f"{key}|{name}":
                    begin, data = int(stored.rsplit("|", 1)[1]), store[stored]
                    low, high = max(begin, offset), min(begin + len(data), offset + length)
                    if low < high:
                        values[low - offset : high - offset] = data[low - begin : high - begin]
                        filled += high - low
        assert filled == length, (key, name, offset, length, filled)
        return torch.from_numpy(values)

    engine, optimizer = make_engine(to_engine, ours(optimizer_name))
    fragments = FragmentMap.from_engine(engine)
    optimizer.attach(fragments)
    prefix = "replicated|"
    replicated = {
        k[len(prefix) :]: torch.from_numpy(stores[0][k]) for k in stores[0].files if k.startswith(prefix)
    }
    counters = json.loads(str(stores[0]["counters"]))
    kept = {tuple(k.split("|")[1:3]) for store in stores for k in store.files if k.startswith("state|")}
    said = optimizer.load_state_by_name(
        replicated, counters, lambda key, *where: read(f"state|{key}", *where), kept
    )
    assert said == []
    for name, shape in PARAMETERS.items():  # as a checkpoint does: whole tensors to every rank
        fragments.load_master(name, 0, read("master", name, 0, int(np.prod(shape))))
    fragments.refresh_model_weights()
    write(f"{case}.loaded", engine, fragments, optimizer, [])
    statistics = []
    for step in range(save_at + 1, STEPS + 1):
        update(engine, step)
        statistics.append(optimizer.statistics.numpy().copy())
    write(f"{case}.resumed", engine, fragments, optimizer, statistics)
    engine.destroy()


def message(action):
    try:
        action()
    except (FragmentError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def broken_maps(engine_name):
    """What is said about maps that are wrong on one rank or on all."""
    engine, optimizer = make_engine(engine_name, ours("adafactor"))
    fragments = FragmentMap.from_engine(engine)
    before = [buffer.detach().clone() for buffer in fragments.buffers]
    complete = list(fragments.fragments)

    def judged(changed):
        fragments.fragments = changed
        return message(lambda: verify_fragments(fragments))

    def altered(position, **fields):
        changed = list(complete)
        changed[position] = type(changed[position])(**{**vars(changed[position]), **fields})
        return changed

    first, last, said = complete[0], complete[-1], {}
    said["hole"] = judged(altered(-1, length=last.length - 1) if RANK == WORLD_SIZE - 1 else complete)
    said["overlap"] = judged(
        [*complete, first] if WORLD_SIZE == 1 else altered(0, offset=first.offset - RANK)
    )
    said["shift"] = judged(altered(0, start=first.start + 1) if RANK == 0 else complete)
    said["restored"] = str(all(torch.equal(a, b) for a, b in zip(before, fragments.buffers, strict=True)))
    fragments.fragments = complete
    verify_fragments(fragments)
    said["state_dict"] = message(optimizer.state_dict)
    engine.destroy()
    return said


def refusals():
    """Broken maps and engines that cannot be mapped: what is said about them."""
    engine, _ = make_engine("stage1_bf16", ours("adafactor"))
    said = {"step before attach": message(lambda: update(engine, 1))}
    engine.destroy()
    for engine_name in ("stage1_bf16", "stage3_bf16"):
        said |= {f"{engine_name} {what}": text for what, text in broken_maps(engine_name).items()}
    for name, engine_name, overrides in (
        (
            "clipping and round robin",
            "stage1_bf16",
            {"gradient_clipping": 1.0, "zero": {"round_robin_gradients": True}},
        ),
        ("offload without way back", "stage2_fp16_offload", {"data_types": {"grad_accum_dtype": "fp32"}}),
        ("quantized", "stage3_bf16", {"zero": {"zero_quantized_gradients": True}}),
        ("parameters away", "stage3_bf16", {"zero": {"offload_param": {"device": "cpu"}}}),
    ):
        if engine_name not in engines():  # no fp16 on this processor
            continue
        engine, _ = make_engine(engine_name, ours("adafactor"), **overrides)
        said[name] = message(lambda engine=engine: FragmentMap.from_engine(engine))
        engine.destroy()
    partial, _ = make_engine(
        "stage1_fp32",
        lambda m: build_optimizer("adafactor", [(n, p) for n, p in m.named_parameters() if n != "odd"]),
    )
    said["forgotten parameter"] = message(lambda: FragmentMap.from_engine(partial))
    partial.destroy()

    def two_groups(model):
        optimizer = ours("adafactor")(model)
        moved = optimizer.param_groups[0]["params"].pop()
        optimizer.add_param_group({"params": [moved]})
        return optimizer

    grouped, _ = make_engine("stage1_fp32", two_groups)
    said["two parameter groups"] = message(lambda: FragmentMap.from_engine(grouped))
    installed, deepspeed.__version__ = deepspeed.__version__, "0.20.0"
    said["another DeepSpeed"] = message(lambda: FragmentMap.from_engine(grouped))
    deepspeed.__version__ = installed
    grouped.destroy()
    if RANK == 0:
        (OUTPUT / f"world{WORLD_SIZE}" / "refusals.json").write_text(json.dumps(said))


def main():
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    quicken_start()
    if WORLD_SIZE <= 2:
        build_extension()
    else:  # gloo alone: more ranks than cores, and who waits by the extension keeps a core from who is waited for
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    start_communication("gloo")
    began = time.perf_counter()
    for case in cases(WORLD_SIZE):
        train(".".join(case), *case, save_at=10)
    if WORLD_SIZE == 2:
        for engine_name in engines():
            case = f"accumulated.{engine_name}"
            train(case, engine_name, "adafactor", spoil_after=5, gradient_accumulation_steps=2)
        unchecked = {
            "zero": {"compute_grad_norm": False},
            "bf16": {"enabled": True, "check_grad_overflow": False},
        }
        train("no_engine_norm", "stage2_bf16", "adafactor", spoil_after=5, **unchecked)
        train("perturbed", "stage1_fp32", "adafactor", perturb_at=10)
        stock_adafactor()
    for case, (from_world, from_engine, to_world, to_engine, optimizer) in MOVES.items():
        if to_world == WORLD_SIZE:
            moved(case, f"{from_engine}.{optimizer}", from_world, to_engine, optimizer, save_at=10)
    refusals()
    print(f"rank {RANK} of {WORLD_SIZE}: {time.perf_counter() - began:.1f} s", flush=True)
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a busy machine sometimes tears gloo's threads down in an order that aborts; all is written


main()
