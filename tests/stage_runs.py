"""One rank of tests/test_zero_stages.py: real runs at one ZeRO stage after the other.

    python stage_runs.py FOLDER PORT…     with the launcher's variables in the environment
FOLDER holds {run}.yaml for the runs of RUNS; each ends with FOLDER/{run}/, as pretrain.py leaves it. A run is a forked
process, which begins with the imports made and nothing else.
"""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import deepspeed  # noqa: F401  the longest of the imports
import torch.distributed as dist
from torch._dynamo.utils import counters

from data_prep.config_file import load_config
from sutrain.config import PretrainConfig
from sutrain.models import gates
from sutrain.pretrain import Run

TINY_STAGE_3 = {"stage": 3, "whole_below_parameters": 0, "sub_group_parameters": 3000}
GATED = {"mixer": "gau", "gau_expansion_size": 48, "gau_key_size": 16, "initialisation": "gau_alpha"}
GATED |= dict.fromkeys(("num_heads", "head_size", "feed_forward_size"))  # which a gated unit does not have
RUNS = {  # name: (what differs in its configuration, the run that it goes on from step 6 of)
    "stage0_fp32": ({"precision": "fp32", "zero": {"stage": 0}}, None),
    "stage1_fp32": ({"precision": "fp32"}, None),
    "stage2_fp32_offload": ({"precision": "fp32", "zero": {"stage": 2, "offload": True}}, None),
    "stage3_fp32": ({"precision": "fp32", "zero": TINY_STAGE_3}, None),
    "stage3_fp32_resumed": ({"precision": "fp32", "zero": TINY_STAGE_3}, "stage3_fp32"),
    "stage3_fp32_recomputed": (
        {"precision": "fp32", "zero": TINY_STAGE_3, "memory": {"activation_mib": 0.12}},
        None,
    ),
    "stage3_fp32_compiled": (
        {
            "precision": "fp32",
            "zero": TINY_STAGE_3,
            "memory": {"activation_mib": 0.12},
            "compile_layers": True,
        },
        None,
    ),
    "stage1_to_stage3": ({"precision": "fp32", "zero": TINY_STAGE_3}, "stage1_fp32"),
    "stage1_bf16": ({"precision": "bf16"}, None),
    "stage3_bf16": ({"precision": "bf16", "zero": {"stage": 3}}, None),
    "stage3_bf16_offload": ({"precision": "bf16", "zero": TINY_STAGE_3 | {"offload": True}}, None),
    "gated_stage1": ({"precision": "fp32", "model": GATED}, None),
    "gated_stage3_recomputed": (
        {"precision": "fp32", "model": GATED, "zero": TINY_STAGE_3, "memory": {"activation_mib": 0.12}},
        None,
    ),
}
FP16 = {"precision": "fp16", "loss_scale": {"initial": 2**20, "hysteresis": 1}}
FP16_RUNS = {
    "stage0_fp16": (FP16 | {"gradient_precision": "fp16", "zero": {"stage": 0}}, None),
    "stage3_fp16": (FP16 | {"zero": TINY_STAGE_3}, None),
    "stage3_fp16_resumed": (FP16 | {"zero": TINY_STAGE_3}, "stage3_fp16"),
}


def train(folder: Path, name: str, origin: str | None, port: str) -> None:
    """One run, on the ranks that meet at `port`."""
    os.environ["MASTER_PORT"] = port
    if origin is not None and os.environ["RANK"] == "0":  # the others wait for this rank to join
        shutil.copytree(folder / origin, folder / name, dirs_exist_ok=True)
        shutil.rmtree(folder / name / "checkpoints/step-00000012")
        (folder / name / "checkpoints/best.json").unlink()
    if name.startswith(
        "gated"
    ):  # its rows are short, yet value and gate are projected again, but under ZeRO-3
        gates.AGAIN_FROM_TOKENS = gates.VALUES_AGAIN_FROM_TOKENS = 1
    run = Run(load_config(PretrainConfig, folder / f"{name}.yaml", []))
    run.train()
    if name.startswith("gated"):
        plain = all(gates.is_plain(layer.mixer.input) for layer in run.engine.module.encoder.layers)
        print(f"{name}: {'projects again' if plain else 'keeps'}", flush=True)
    compiler = "with" if "torch._inductor.compile_fx" in sys.modules else "without"
    print(f"{name}: {counters['stats']['unique_graphs']} programs, {compiler} compiler", flush=True)
    dist.destroy_process_group()


def main(folder: Path, ports: list[str]) -> None:
    if os.environ["RANK"] != "0":
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is read is what the first rank says
    present = {name: run for name, run in (RUNS | FP16_RUNS).items() if (folder / f"{name}.yaml").is_file()}
    for (name, (_, origin)), port in zip(present.items(), ports, strict=True):
        child = multiprocessing.get_context("fork").Process(target=train, args=(folder, name, origin, port))
        child.start()
        child.join()
        if child.exitcode != 0:
            sys.exit(f"{name} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
