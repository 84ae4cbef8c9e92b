"""The compiled passes against the eager ones, on fragments as ragged as ZeRO cuts them."""

import sys
import time
from itertools import pairwise

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sutrain.optim import Fragment, FragmentMap, build_optimizer
from sutrain.optim.fragments import Surroundings
from sutrain.optim.kernels import KernelError, Layout, build_kernels, compiled
from sutrain.optim.kernels.compiled import CHUNK, CompiledKernels, tables
from sutrain.optim.kernels.eager import EagerKernels
from tests import warm

SHAPES = {
    "scalar": (),
    "vector": (2 * CHUNK + 5,),  # several chunks
    "odd": (7, 13),
    "many_rows": (400, 501),  # partial column sums of several chunks
    "long_lines": (3, CHUNK + 3),
    "batched": (2, 300, 400),  # slabs larger than a chunk
    "small_slabs": (5000, 3, 7),  # slabs far smaller than a chunk
    "batch_last": (150, 90, 6),  # its two largest dimensions are not the last two
    "four": (3, 40, 5, 30),
    "zero": (6, 5),  # never has a gradient
}

CASES = {
    "adafactor": ("adafactor", {"weight_decay": 0.1}),
    "adafactor_largest_momentum": (
        "adafactor",
        {"momentum": 0.9, "weight_decay": 0.1, "factored_dimensions": "largest", "clip_global_norm": 1.0},
    ),
    "adafactor_plain": ("adafactor", {"clip_threshold": None, "parameter_scale": False}),
    "adafactor_torch": ("adafactor", {"preset": "torch", "weight_decay": 0.1}),
    "adafactor_whole": ("adafactor", {"preset": "bert4keras_finetune"}),
    "lamb": ("lamb", {"weight_decay": 0.01, "clip_global_norm": 1.0}),
    "adamw": ("adamw", {"weight_decay": 0.1, "clip_global_norm": 1.0}),
    "guarded": ("adafactor", {"update_guard": 1.01, "guard_window": 2, "learning_rate": 0.01}),
}


def ragged_map(seed=0):
    """A process that owns a run of every tensor which begins and ends anywhere, in one flat buffer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    places, start = [], 5
    for tensor, (name, shape) in enumerate(shapes.items()):
        cut = torch.randint(0, max(1, shape.numel() // 3), (2,), generator=generator).tolist()
        offset, length = cut[0], shape.numel() - sum(cut)
        places.append((name, tensor, shape, offset, length, start))
        start += length + 3
    buffer = torch.nn.Parameter(torch.randn(start, generator=generator) * 0.1)
    fragments = [Fragment(*place[:5], buffer, place[5]) for place in places]
    return FragmentMap(shapes, fragments, buffers=[buffer], around=Surroundings())


@pytest.mark.parametrize("name", ["adafactor", "lamb", "adamw", "egd"])
def test_eager_passes_read_numbers_back_once_an_update(name, monkeypatch):
    """Where masters are on a GPU the host waits for the device as often."""
    model = torch.nn.Linear(6, 5)
    optimizer = build_optimizer(name, model.named_parameters(), weight_decay=0.1, kernels="eager")
    optimizer.attach(FragmentMap.whole(model.named_parameters()))
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(0) or tolist(tensor))
    counts = []
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        counts.append(len(reads))
    assert [after - before for before, after in pairwise(counts)] == [1, 1, 1]


def trained(case, kernels, steps=4, seed=0):
    kind, settings = CASES[case]
    fragments = ragged_map(seed)
    (buffer,) = fragments.buffers
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    optimizer = build_optimizer(kind, named, **{"learning_rate": 0.01, **settings}, kernels=kernels)
    optimizer.param_groups[0]["params"] = [buffer]
    optimizer.attach(fragments)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        buffer.grad = torch.randn(buffer.shape, generator=generator) * 10.0 ** (-step % 3)
        odd, zero = fragments.fragments[2], fragments.fragments[-1]
        buffer.grad[zero.start : zero.start + zero.length] = 0
        buffer.grad[odd.start : odd.start + odd.length : 13] = 0  # a column
        optimizer.step()
    return optimizer


def everything(optimizer):
    """Weights, state and statistics, by name."""
    state = optimizer.state_by_name()
    found = {f"weight {name}": values for name, _, values in optimizer.fragments.master_slices()}
    found |= {f"{key} {name}": values for key, name, _, values in state.sliced} | state.replicated
    table = optimizer.statistics
    return found | {f"statistic {name}": table[i] for i, name in enumerate(optimizer.tensor_names)}


def largest_difference(left, right):
    """Relative to the largest value of each tensor; where one has NaN or infinity the other must have it."""
    assert set(left) == set(right)
    worst = (0.0, "")
    for key in left:
        a, b = left[key].double(), right[key].double()
        assert torch.equal(a.isfinite(), b.isfinite()), key
        a, b = a[a.isfinite()], b[b.isfinite()]
        if key.startswith("statistic"):
            difference = ((a - b).abs() / b.abs().clamp(min=1e-30)).max().item()
        else:
            difference = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        worst = max(worst, (difference, key))
    return worst


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_compiled_passes_equal_the_eager_ones(case, seed):
    fast, slow = trained(case, "compiled", seed=seed), trained(case, "eager", seed=seed)
    assert isinstance(fast._passes, CompiledKernels)
    assert isinstance(slow._passes, EagerKernels)
    difference, where = largest_difference(everything(fast), everything(slow))
    assert difference < (1e-6 if not where.startswith("statistic") else 3e-6), (where, difference)


@pytest.mark.parametrize("case", ["adafactor_largest_momentum", "lamb"])
def test_results_are_the_same_bits_for_any_number_of_threads(case):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(trained(case, "compiled"))
        torch.set_num_threads(3)
        three = everything(trained(case, "compiled"))
    finally:
        torch.set_num_threads(before)
    for key, value in one.items():
        assert torch.equal(value.nan_to_num(7.0), three[key].nan_to_num(7.0)), key


def test_chunks_cover_every_element_once_and_never_share_a_sum():
    fragments = ragged_map()
    pairs = [None if len(s) < 2 else (len(s) - 2, len(s) - 1) for s in fragments.shapes.values()]
    layout = Layout.of(fragments, pairs)
    _, chunks, groups, partials = tables(layout)
    for index, fragment in enumerate(fragments.fragments):
        own = [(begin, end) for f, begin, end, _ in chunks.tolist() if f == index]
        assert [begin for begin, _ in own] == [0, *(end for _, end in own[:-1])]
        assert own[-1][1] == fragment.length
    assert len(groups) >= 3
    assert partials > 0
    in_groups = {chunk for first, last, _, _ in groups.tolist() for chunk in range(first, last)}
    assert in_groups == {i for i, chunk in enumerate(chunks.tolist()) if chunk[3] >= 0}


@pytest.mark.parametrize("name", ["adafactor", "lamb", "egd"])
@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_the_memory_of_gradients_is_free_after_an_update(name, kernels):
    """The engine lets go of them before the next forward pass, which needs the room."""
    model = torch.nn.Linear(6, 5)
    optimizer = build_optimizer(name, model.named_parameters(), kernels=kernels)
    optimizer.attach(FragmentMap.whole(model.named_parameters()))
    for value in (1.0, float("nan")):  # also of an update that is not made
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        held = [StorageWeakRef(parameter.grad.untyped_storage()) for parameter in model.parameters()]
        optimizer.step()
        model.zero_grad(set_to_none=True)
        assert all(memory.expired() for memory in held)


def test_memory_of_another_type_is_refused():
    optimizer = trained("adafactor", "compiled", steps=1)
    (buffer,) = optimizer.fragments.buffers
    with pytest.raises(ValueError, match=r"contiguous fp32 values .* torch\.float64"):
        optimizer._passes.begin([buffer.double()])


def test_auto_takes_the_compiled_passes_and_says_when_it_cannot(monkeypatch):
    assert isinstance(trained("lamb", "auto", steps=1)._passes, CompiledKernels)
    monkeypatch.setenv("PATH", "/nowhere")
    compiled.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="without compiled kernels.*g\\+\\+"):
            assert isinstance(trained("lamb", "auto", steps=1)._passes, EagerKernels)
        with pytest.raises(KernelError, match=r"apt-get install g\+\+"):
            trained("lamb", "compiled", steps=1)
    finally:
        compiled.library.cache_clear()


def test_a_source_that_does_not_compile_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "cpu.cpp"
    broken.write_text("int f( {")
    monkeypatch.setattr(compiled, "SOURCE", broken)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compiled.library.cache_clear()
    try:
        with pytest.raises(KernelError, match="does not compile: .*error"):
            trained("lamb", "compiled", steps=1)
    finally:
        compiled.library.cache_clear()


def test_several_processes_may_compile_at_once(tmp_path):
    program = "from sutrain.optim.kernels.compiled import library; library(); print('loaded')"
    began = time.perf_counter()
    said = warm.run("-c", program, ranks=3, variables={"TORCH_EXTENSIONS_DIR": str(tmp_path)}).stdout
    assert sorted(said.split()) == ["loaded"] * 3
    assert len(list((tmp_path / "sutrain_optimizers").iterdir())) == 1
    assert time.perf_counter() - began < 60


def test_triton_without_triton_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sutrain.optim.kernels.gpu", raising=False)
    with pytest.raises(KernelError, match="comes with torch's CUDA build"):
        trained("lamb", "triton", steps=1)


def test_compiled_kernels_are_for_the_cpu():
    layout = Layout.of(ragged_map(), [None] * len(SHAPES))
    with pytest.raises(KernelError, match="on cuda"):
        build_kernels("compiled", layout, torch.device("cuda"), [], [])
    assert isinstance(build_kernels("auto", layout, torch.device("cuda"), [], []), EagerKernels)
