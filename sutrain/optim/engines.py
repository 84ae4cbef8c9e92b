"""Read the fragment map out of a DeepSpeed engine. What depends on DeepSpeed's internals is in this file and in
loss_scale.py.

Each of its optimizer wrappers keeps fp32 masters in its own way (names as of DeepSpeed 0.19.8):

    stage 0, fp32         our optimizer itself            masters are the parameters
    stage 0, 16 bit       FP16_UnfusedOptimizer           a whole fp32 copy per parameter, on every rank
    stage 1, 2            DeepSpeedZeroOptimizer          one flat fp32 slice per rank
    stage 1, bf16 with    BF16_Optimizer                  one flat fp32 slice per rank, gradients accumulated in fp32
      fp32 accumulation
    stage 3               DeepSpeedZeroOptimizer_Stage3   one flat fp32 slice per rank and sub-group

The wrappers of stages 1 and 2 link every parameter to its part of the slice (`param._hp_mapping`). Stage 3 cuts every
parameter by itself: rank r of W owns elements [r·n, (r+1)·n) with n = ⌈numel / W⌉, the last ones padded to n, and a
sub-group's slice is its parameters' pieces of n end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fragments import Fragment, FragmentError, FragmentMap, Surroundings, is_optimized, whole_shape
from .loss_scale import ForgottenScale, LossScaler

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


def map_engine(engine: Any) -> FragmentMap:
    """The map of `engine`, not yet verified. Raises FragmentError."""
    check_deepspeed_version()
    _refuse_unsupported(engine)
    parameters = {name: p for name, p in engine.module.named_parameters() if is_optimized(p)}  # tied: once
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _map_copies(engine, parameters)
    return _map_slices(engine, parameters) if stage < 3 else _map_sub_groups(engine, parameters)


def _map_copies(engine: Any, parameters: dict[str, Tensor]) -> FragmentMap:
    wrapper = engine.optimizer
    has_copies = hasattr(wrapper, "fp32_groups")
    if has_copies:
        masters = dict(zip(map(id, wrapper.fp16_groups[0]), wrapper.fp32_groups[0], strict=True))
    else:
        masters = {id(parameter): parameter for parameter in wrapper.param_groups[0]["params"]}
    _refuse_missing([name for name, p in parameters.items() if id(p) not in masters])

    def refresh() -> None:
        for parameter in parameters.values():
            if masters[id(parameter)] is not parameter:
                parameter.data.copy_(masters[id(parameter)])

    by_name = {name: masters[id(parameter)] for name, parameter in parameters.items()}
    scaler = _loss_scaler(engine)
    if scaler is not None:
        engine.torch_autocast_z0_gradscaler = ForgottenScale(scaler)
    around = Surroundings(
        replicated=True,
        refresh=refresh,
        weights=parameters.__getitem__,
        checks_finite=has_copies,
        loss_scaler=scaler,
    )
    return FragmentMap.of_copies(parameters, by_name, around)


def _map_slices(engine: Any, parameters: dict[str, Tensor]) -> FragmentMap:
    wrapper = engine.optimizer
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
    checks = getattr(wrapper, "check_grad_overflow", True)  # BF16_Optimizer always does
    by_norm = getattr(wrapper, "compute_grad_norm", True) and not engine.bfloat16_enabled()
    around = Surroundings(
        replicated=False,
        group=engine.seq_data_parallel_group,
        device=torch.device(engine.device),
        refresh=wrapper.update_lp_params,
        weights=parameters.__getitem__,
        checks_finite=checks or by_norm,
        forget_gradients=lambda: _zero_gradients(slices if _offloads(engine) else []),
        loss_scaler=_loss_scaler(engine),
    )
    return FragmentMap(shapes, fragments, buffers=slices, around=around)


def _map_sub_groups(engine: Any, parameters: dict[str, Tensor]) -> FragmentMap:
    wrapper, group = engine.optimizer, engine.seq_data_parallel_group
    names = {id(parameter): name for name, parameter in parameters.items()}
    index = {name: position for position, name in enumerate(parameters)}
    shapes = {name: whole_shape(parameter) for name, parameter in parameters.items()}
    rank = torch.distributed.get_rank(group)
    fragments, buffer_names = [], []
    for sub_group, buffer in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        buffer_names.append([names[id(parameter)] for parameter in sub_group])
        start = 0
        for name, parameter in zip(buffer_names[-1], sub_group, strict=True):
            piece = parameter.partition_numel()
            offset = rank * piece
            length = min(piece, shapes[name].numel() - offset)
            if length > 0:
                fragments.append(Fragment(name, index[name], shapes[name], offset, length, buffer, start))
            start += piece
    held = {name for part in buffer_names for name in part}
    _refuse_missing([name for name in parameters if name not in held])
    around = Surroundings(
        replicated=False,
        group=group,
        device=torch.device(engine.device),
        refresh=lambda: _refresh_sub_groups(wrapper),
        weights=_gather(parameters),
        in_parts=True,
        grad_norm=lambda: wrapper._global_grad_norm,
        checks_finite=True,
        forget_gradients=lambda: _forget_gradients(wrapper),
        loss_scaler=_loss_scaler(engine),
    )
    buffers = list(wrapper.fp32_partitioned_groups_flat)
    return FragmentMap(shapes, fragments, buffers=buffers, around=around, buffer_names=buffer_names)


def _refresh_sub_groups(wrapper: Any) -> None:
    """What the wrapper does around an update: drop whole parameters, round the pieces, gather the small ones that
    always stay whole."""
    wrapper._partition_all_parameters()
    for sub_group in range(len(wrapper.fp16_groups)):
        wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
    if wrapper.persistent_parameters:
        wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)


def _forget_gradients(wrapper: Any) -> None:
    """It accumulates into a flat buffer, of which only the pieces of tensors that are used are written anew."""
    wrapper.grad_partitions_flat_buffer.zero_()
    _zero_gradients(wrapper.fp32_partitioned_groups_flat)  # those of CPU offload; else there are none by now


def _zero_gradients(buffers: list[Tensor]) -> None:
    for buffer in buffers:
        if buffer.grad is not None:
            buffer.grad.zero_()


def _gather(parameters: dict[str, Tensor]) -> Callable[[str], Tensor]:
    def whole(name: str) -> Tensor:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

        parameter: Any = parameters[name]
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # one that always stays whole
            return parameter.detach().clone()
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    return whole


def _loss_scaler(engine: Any) -> LossScaler | None:
    return LossScaler(engine.optimizer) if engine.fp16_enabled() else None


def _offloads(engine: Any) -> bool:
    offload = engine.zero_offload_optimizer()
    return offload is not None and offload.device != "none"


def _refuse_missing(names: list[str]) -> None:
    if names:
        raise FragmentError(
            f"trainable parameters that the optimizer was not given: {', '.join(names)}; pass all of "
            "model.named_parameters() to build_optimizer, or freeze them with requires_grad_(False)"
        )


def _refuse_unsupported(engine: Any) -> None:
    """Raises FragmentError, one line for each setting of the engine that the fragment map cannot follow."""
    offload, parameters_offload = engine.zero_offload_optimizer(), engine.zero_offload_param()
    round_robin, clipping = engine.zero_round_robin_gradients(), engine.gradient_clipping()
    wrapper, zero = engine.optimizer, engine._config.zero_config
    split_tensors = getattr(wrapper, "model_parallel_world_size", 1) > 1 or engine.autotp_size() > 1
    keeps_infinite_sums = (
        _offloads(engine)
        and engine.zero_optimization_stage() < 3
        and wrapper.check_grad_overflow
        and wrapper._use_compact_grad_partition_buffer(0)
    )
    sixteen_bit_masters = getattr(wrapper, "low_precision_master_weights_and_grads", False) or (
        getattr(wrapper, "master_weights_and_grads_dtype", torch.float32) != torch.float32
    )
    refusals = {
        "zero_optimization.round_robin_gradients reorders tensors: set false": round_robin,
        f"gradient_clipping is {clipping} (unset means 1.0): set 0.0 and give clip_global_norm to the "
        "optimizer, which clips from sums it computes anyway": clipping != 0,
        "zero_optimization.offload_optimizer to nvme swaps masters out between updates: use cpu": (
            offload is not None and offload.device == "nvme"
        ),
        "zero_optimization.offload_optimizer at stage 1 or 2, of 16-bit weights with fp32 gradients, never recovers "
        "from an overflow that the engine sees (it keeps the infinite sums): set bf16.check_grad_overflow false, which "
        "leaves the check to the optimizer; in fp16 use stage 3, or data_types.grad_accum_dtype fp16": (
            keeps_infinite_sums
        ),
        "zero_optimization.offload_param moves the weights away from the engine's device: remove it": (
            parameters_offload is not None and parameters_offload.device != "none"
        ),
        "zero_optimization.offload_optimizer.super_offload needs DeepSpeed's own Adam: remove it": (
            engine.super_offload()
        ),
        "zero_optimization.zenflow: remove it": engine.zenflow,
        "zero_optimization.zero_hpz_partition_size keeps a second copy of the weights: set 1": (
            zero.zero_hpz_partition_size > 1
        ),
        "zero_optimization.zero_quantized_weights and …_gradients round what they send: set false": (
            zero.zero_quantized_weights or zero.zero_quantized_gradients
        ),
        "torch_autocast is untested: use bf16, or autocast inside the model": engine.torch_autocast_enabled(),
        "mixture-of-experts layers are spread over other ranks than the rest": engine.has_moe_layers,
        "pipeline parallelism: each stage holds other tensors": engine.pipeline_parallelism,
        "tensor parallelism spreads a tensor over a second group of ranks": split_tensors,
        "several parameter groups: give per_tensor settings to build_optimizer": (
            len(wrapper.param_groups) != 1
        ),
        "16-bit master weights lose small updates: keep them in fp32": sixteen_bit_masters,
    }
    problems = [text for text, applies in refusals.items() if applies]
    if problems:
        raise FragmentError("this DeepSpeed engine cannot be trained with:\n  " + "\n  ".join(problems))
