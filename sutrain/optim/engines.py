"""Read the fragment map out of a DeepSpeed engine. All that depends on DeepSpeed's internals is in this file.

Each of its optimizer wrappers keeps fp32 masters in its own way (names as of DeepSpeed 0.19.8):

    stage 0, fp32         our optimizer itself       masters are the parameters
    stage 0, bf16         FP16_UnfusedOptimizer      a whole fp32 copy per parameter, on every rank
    stage 1, 2            DeepSpeedZeroOptimizer     one flat fp32 slice per rank
    stage 1, bf16 with    BF16_Optimizer             one flat fp32 slice per rank, gradients accumulated in
    fp32
      fp32 accumulation

The ZeRO wrappers link every parameter to its part of the slice (`param._hp_mapping`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .fragments import Fragment, FragmentError, FragmentMap, is_optimized

DEEPSPEED_VERSION = "0.19.8"
"""The version whose internals this file was written and tested against."""


def check_deepspeed_version() -> None:
    """Raises FragmentError when another DeepSpeed is installed: its private layout may have changed."""
    import deepspeed

    if deepspeed.__version__.split("+")[0] != DEEPSPEED_VERSION:
        raise FragmentError(
            f"DeepSpeed {deepspeed.__version__} is installed, but the fragment map relies on the layout of "
            f"{DEEPSPEED_VERSION}: pip install deepspeed=={DEEPSPEED_VERSION}"
        )


def map_engine(engine: Any) -> tuple[FragmentMap, dict[str, Tensor]]:
    """The map of `engine` and the parameters the model computes with, by name. Raises FragmentError."""
    check_deepspeed_version()
    _refuse_unsupported(engine)
    parameters = {name: p for name, p in engine.module.named_parameters() if is_optimized(p)}  # tied: once
    if engine.zero_optimization_stage() == 0:
        return _map_copies(engine.optimizer, parameters), parameters
    return _map_zero(engine.optimizer, parameters, engine.seq_data_parallel_group), parameters


def _map_copies(wrapper: Any, parameters: dict[str, Tensor]) -> FragmentMap:
    if hasattr(wrapper, "fp32_groups"):
        masters = dict(zip(map(id, wrapper.fp16_groups[0]), wrapper.fp32_groups[0], strict=True))
    else:
        masters = {id(parameter): parameter for parameter in wrapper.param_groups[0]["params"]}
    _refuse_missing([name for name, p in parameters.items() if id(p) not in masters])

    def refresh() -> None:
        for parameter in parameters.values():
            if masters[id(parameter)] is not parameter:
                parameter.data.copy_(masters[id(parameter)])

    by_name = {name: masters[id(parameter)] for name, parameter in parameters.items()}
    return FragmentMap.of_copies(parameters, by_name, refresh)


def _map_zero(wrapper: Any, parameters: dict[str, Tensor], group: Any) -> FragmentMap:
    _refuse_missing([name for name, p in parameters.items() if not hasattr(p, "_hp_mapping")])
    slices = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
    fragments = []
    for index, (name, parameter) in enumerate(parameters.items()):
        link = parameter._hp_mapping  # type: ignore[attr-defined]
        if link is None:  # all of it belongs to other ranks
            continue
        model, master = link.lp_fragment_address, link.hp_fragment_address
        fragments.append(
            Fragment(name, index, parameter.shape, model.start, model.numel, slices[0], master.start)
        )
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    return FragmentMap(
        shapes, fragments, buffers=slices, replicated=False, group=group, refresh=wrapper.update_lp_params
    )


def _refuse_missing(names: list[str]) -> None:
    if names:
        raise FragmentError(
            f"trainable parameters that the optimizer was not given: {', '.join(names)}; pass all of "
            "model.named_parameters() to build_optimizer, or freeze them with requires_grad_(False)"
        )


def _refuse_unsupported(engine: Any) -> None:
    """Raises FragmentError, one line for each setting of the engine that the fragment map cannot follow."""
    stage, offload = engine.zero_optimization_stage(), engine.zero_offload_optimizer()
    round_robin, clipping = engine.zero_round_robin_gradients(), engine.gradient_clipping()
    wrapper = engine.optimizer
    split_tensors = getattr(wrapper, "model_parallel_world_size", 1) > 1 or engine.autotp_size() > 1
    refusals = {
        f"zero_optimization.stage {stage} also partitions parameters: use 0, 1 or 2": stage > 2,
        "zero_optimization.round_robin_gradients reorders tensors: set false": round_robin,
        f"gradient_clipping is {clipping} (unset means 1.0): set 0.0 and give clip_global_norm to the "
        "optimizer, which clips from sums it computes anyway": clipping != 0,
        "zero_optimization.offload_optimizer: remove it": offload is not None and offload.device != "none",
        "zero_optimization.zenflow: remove it": engine.zenflow,
        "fp16 rescales gradients around the optimizer, which is untested: use bf16": engine.fp16_enabled(),
        "torch_autocast is untested: use bf16, or autocast inside the model": engine.torch_autocast_enabled(),
        "mixture-of-experts layers are spread over other ranks than the rest": engine.has_moe_layers,
        "pipeline parallelism: each stage holds other tensors": engine.pipeline_parallelism,
        "tensor parallelism spreads a tensor over a second group of ranks": split_tensors,
        "several parameter groups: give per_tensor settings to build_optimizer": len(wrapper.param_groups)
        != 1,
        "16-bit master weights lose small updates: keep them in fp32": getattr(
            wrapper, "low_precision_master_weights_and_grads", False
        ),
    }
    problems = [text for text, applies in refusals.items() if applies]
    if problems:
        raise FragmentError("this DeepSpeed engine cannot be trained with:\n  " + "\n  ".join(problems))
