"""The optimizers in one process: parity with other implementations, clipping, statistics, settings,
refusals. Their state: test_state.py."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from sutrain.optim import OPTIMIZERS, STATISTICS, FragmentError, FragmentMap, build_optimizer
from sutrain.optim.adafactor import PRESETS
from sutrain.optim.build import settings_of

SHAPES = {"matrix": (17, 29), "square": (64, 64), "cube": (3, 5, 7), "vector": (31,), "scalar": ()}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for name, shape in SHAPES.items()
    }


def gradients(step):
    generator = torch.Generator().manual_seed(1000 + step)
    scale = 10.0 ** (step * 5 % 3 - 2)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def standalone(name, own, **settings):
    optimizer = build_optimizer(name, own.items(), **settings)
    optimizer.attach(FragmentMap.whole(own.items()))
    return optimizer


def run(optimizer, own, steps):
    for step in range(1, steps + 1):
        for name, gradient in gradients(step).items():
            own[name].grad = gradient.clone()
        optimizer.step()
    return own


@torch.no_grad()
def assert_same(left, right, bound):
    for name in SHAPES:
        error = (left[name] - right[name]).abs().max() / right[name].abs().max()
        assert error < bound, (name, float(error))


def column(optimizer, name):
    return optimizer.statistics[:, STATISTICS.index(name)]


def test_adafactor_agrees_with_torch():
    """Where settings coincide: lr below 1/√t, ε so small that neither way of adding it matters."""
    own, other = parameters(), parameters()
    theirs = torch.optim.Adafactor(other.values(), lr=0.02, weight_decay=0.1, eps=(1e-15, 1e-3))
    run(standalone("adafactor", own, learning_rate=0.02, weight_decay=0.1), own, 30)
    assert_same(own, run(theirs, other, 30), 2e-6)


@pytest.mark.parametrize("relative", [True, False])
def test_adafactor_agrees_with_transformers(relative):
    own, other = parameters(), parameters()
    theirs = transformers.optimization.Adafactor(
        other.values(), lr=None if relative else 0.02, relative_step=relative, scale_parameter=True
    )
    preset = {"preset": "paper"} if relative else {"learning_rate": 0.02}
    run(standalone("adafactor", own, **preset), own, 30)
    assert_same(own, run(theirs, other, 30), 2e-6)


@pytest.mark.parametrize("kernels", ["compiled", "eager"])
@pytest.mark.parametrize("learning_rate", [0.01, 0.5])
def test_preset_torch_is_torchs_adafactor_with_its_defaults(learning_rate, kernels):
    """Also where its ε1 matters, gradients of 1e-9 and none at all, and where 1/√t caps the learning rate but not the
    weight decay."""
    own, other = parameters(), parameters()
    settings = {"learning_rate": learning_rate, "weight_decay": 0.1, "preset": "torch", "kernels": kernels}
    optimizer = standalone("adafactor", own, **settings)
    theirs = torch.optim.Adafactor(other.values(), lr=learning_rate, weight_decay=0.1)
    for step in range(1, 31):
        for name, gradient in gradients(step).items():
            gradient = gradient * (1e-9 if name in ("square", "vector") else 1.0)
            if name == "cube":
                gradient[1] = 0
            own[name].grad, other[name].grad = gradient.clone(), gradient.clone()
        optimizer.step()
        theirs.step()
    assert_same(own, other, 3e-6)
    assert not torch.equal(own["square"], parameters()["square"])


def test_presets_differ_from_each_other():
    """Each does what its name says and not what another does."""
    results = {}
    for preset in [None, *PRESETS]:
        own = parameters()
        settings = {} if preset is None else {"preset": preset}
        run(standalone("adafactor", own, learning_rate=0.02, **settings), own, 3)
        results[preset] = own
    for left, right in itertools.combinations(results, 2):
        if {left, right} != {None, "torch"}:  # which differ for tiny gradients and after many updates
            assert not torch.equal(results[left]["matrix"], results[right]["matrix"]), (left, right)


def test_preset_bert4keras_finetune_is_unfactored_with_momentum_before_the_parameter_scale():
    """kexue.fm/archives/7302 and its author's optimizers.py, written out on one tensor in float64."""
    own = parameters()
    optimizer = standalone("adafactor", own, preset="bert4keras_finetune", learning_rate=5e-4)
    theta, m, v = own["matrix"].detach().double().clone(), 0.0, 0.0
    for step in range(1, 11):
        gradient = gradients(step)["matrix"].double()
        beta = 1 - step**-0.8
        v = beta * v + (1 - beta) * (gradient**2 + 1e-30)
        u = gradient / v.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        m = 0.9 * m + 0.1 * u
        theta = theta - 5e-4 * max(1e-3, theta.square().mean().sqrt().item()) * m
    run(optimizer, own, 10)
    assert optimizer.state_by_name().replicated == {}
    error = (own["matrix"] - theta).abs().max() / theta.abs().max()
    assert error < 2e-7
    moved = (theta - parameters()["matrix"]).abs().max() / theta.abs().max()
    assert moved > 1e-4


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_agrees_with_torch(decay):
    own, other = parameters(), parameters()
    theirs = torch.optim.AdamW(other.values(), lr=0.01, weight_decay=decay)
    run(standalone("adamw", own, learning_rate=0.01, weight_decay=decay), own, 30)
    assert_same(own, run(theirs, other, 30), 1e-5)


def test_bert4keras_preset_does_not_factor_small_matrices():
    own = parameters()
    optimizer = run_once("adafactor", own, preset="bert4keras", learning_rate=0.001)
    state = optimizer.state_by_name()
    assert state.replicated == {}
    assert {name for _, name, _, _ in state.sliced} == set(SHAPES)


def run_once(name, own, **settings):
    optimizer = standalone(name, own, **settings)
    run(optimizer, own, 1)
    return optimizer


def test_largest_dimensions_are_factored_on_request():
    own = {"kernel": nn.Parameter(torch.randn(40, 3, 50))}
    optimizer = standalone("adafactor", own, factored_dimensions="largest")
    shapes = {key: tuple(value.shape) for key, value in optimizer.state_by_name().replicated.items()}
    assert shapes == {"row_mean|kernel": (40, 3, 1), "column_mean|kernel": (1, 3, 50)}


def test_first_update_moves_by_lr_times_parameter_size():
    """At t=1, β̂2 is 0 and a matrix of ±1 gradients has RMS(U) = 1: RMS(Δθ) = lr · max(ε2, RMS(θ))."""
    own = {"zero": nn.Parameter(torch.zeros(8, 8)), "large": nn.Parameter(torch.full((8, 8), 3.0))}
    optimizer = standalone("adafactor", own, learning_rate=0.01)
    for parameter in own.values():
        parameter.grad = torch.ones(8, 8) * 1e-9
    optimizer.step()
    moved = (column(optimizer, "update_square_sum") / column(optimizer, "numel")).sqrt()
    assert moved.tolist() == pytest.approx([0.01 * 1e-3, 0.01 * 3.0], rel=1e-5)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lamb_stays_finite_where_gradients_have_ceased(kernels, decay):
    """Momentum fades to nothing, through squares that fp32 has only as denormal numbers."""
    own = {"weight": nn.Parameter(torch.randn(6, 5))}
    optimizer = standalone("lamb", own, learning_rate=1e-3, weight_decay=decay, kernels=kernels)
    for update in range(1100):
        own["weight"].grad = torch.full((6, 5), 1e-3 if update < 3 else 0.0)
        optimizer.step()
        assert torch.isfinite(optimizer.statistics[:, 3]).all() and torch.isfinite(own["weight"]).all(), (
            update
        )


def test_lamb_moves_each_tensor_by_lr_times_its_norm():
    own = parameters()
    optimizer = standalone("lamb", own, learning_rate=0.01, weight_decay=0.01)
    run(optimizer, own, 3)
    ratio = (column(optimizer, "update_square_sum") / column(optimizer, "weight_square_sum")).sqrt()
    assert ratio.tolist() == pytest.approx([0.01] * len(SHAPES), rel=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_statistics_are_those_of_the_applied_difference(name):
    momentum = {"momentum": 0.9} if name == "adafactor" else {}
    own = parameters()
    optimizer = standalone(name, own, learning_rate=0.01, weight_decay=0.3, clip_global_norm=0.5, **momentum)
    for step in range(1, 6):
        before = {key: value.detach().clone() for key, value in own.items()}
        for key, gradient in gradients(step).items():
            own[key].grad = gradient.clone()
        optimizer.step()
        for index, key in enumerate(optimizer.tensor_names):
            row = dict(zip(STATISTICS, optimizer.statistics[index].tolist(), strict=True))
            assert row["weight_square_sum"] == pytest.approx(float(before[key].square().sum()), rel=1e-5)
            assert row["grad_square_sum"] == pytest.approx(
                float(gradients(step)[key].square().sum()), rel=1e-5
            )
            applied = float((own[key].detach() - before[key]).double().square().sum())
            assert row["update_square_sum"] == pytest.approx(applied, rel=1e-4)
            assert row["numel"] == own[key].numel()
        total = math.sqrt(float(sum(g.square().sum() for g in gradients(step).values())))
        assert optimizer.global_grad_norm == pytest.approx(total, rel=1e-5)
        assert optimizer.global_clip_factor == pytest.approx(min(1.0, 0.5 / total), rel=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_equals_clipped_gradients(name):
    own, other = parameters(), parameters()
    clipping = standalone(name, own, learning_rate=0.01, clip_global_norm=0.5)
    plain = standalone(name, other, learning_rate=0.01)
    run(clipping, own, 5)
    for step in range(1, 6):
        for key, gradient in gradients(step).items():
            other[key].grad = gradient.clone()
        nn.utils.clip_grad_norm_(other.values(), 0.5)
        plain.step()
    assert_same(own, other, 1e-5)


def test_sums_of_large_tensors_are_accurate():
    """fp32 dot and norm lose 1e-3 here."""
    own = {"embedding": nn.Parameter(torch.randn(30_000, 512, generator=torch.Generator().manual_seed(0)))}
    optimizer = standalone("adafactor", own)
    own["embedding"].grad = own["embedding"].detach().clone()
    exact = float(own["embedding"].detach().double().square().sum())
    optimizer.step()
    assert column(optimizer, "weight_square_sum").item() == pytest.approx(exact, rel=2e-6)
    assert column(optimizer, "grad_square_sum").item() == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_skipped(name, bad):
    own, other = parameters(), parameters()
    optimizer = standalone(name, own, learning_rate=0.01)
    run(optimizer, own, 3)
    for key, gradient in gradients(4).items():
        own[key].grad = gradient.clone()
    own["cube"].grad[1, 2, 3] = bad
    optimizer.step()
    assert (optimizer.updates, optimizer.skipped_updates, optimizer.last_update_applied) == (3, 1, False)
    assert column(optimizer, "update_square_sum").tolist() == [0.0] * len(SHAPES)
    run(standalone(name, other, learning_rate=0.01), other, 3)
    assert all(torch.equal(own[key], other[key]) for key in SHAPES)


def test_frozen_and_tied_parameters():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    model.register_parameter("still", nn.Parameter(torch.ones(3), requires_grad=False))
    optimizer = standalone("adamw", dict(model.named_parameters()))
    assert optimizer.tensor_names == ["a.weight"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adafaktor", {}, "'adafaktor' is unknown, expected one of adafactor, lamb, adamw, egd"),
        (
            "adafactor",
            {"momentun": 0.9, "weight_decai": 1},
            "did you mean momentum.*\n.*did you mean weight_decay",
        ),
        ("adafactor", {"preset": "papre"}, "preset 'papre' is unknown"),
        (
            "adafactor",
            {"momentum": 1.5, "decay_exponent": 0},
            "decay_exponent is 0.*\nadafactor: momentum is 1.5",
        ),
        ("adafactor", {"epsilon_gradient": 0}, "above 1e-37, or 0 with epsilon_root"),
        ("adafactor", {"relative_step": True, "inverse_sqrt_cap": True}, "both set: choose one"),
        ("adafactor", {"warmup_initialisation": True}, "no effect without relative_step"),
        (
            "adafactor",
            {"kernels": "fast"},
            "kernels is 'fast', expected one of auto, compiled, triton, eager",
        ),
        ("lamb", {"update_guard": 1.0, "guard_window": 0}, "update_guard is 1.0.*\nlamb: guard_window is 0"),
        ("egd", {"gain_limits": (2, 10), "exponent_limit": 0}, "gain_limits is .*\negd: exponent_limit is 0"),
        ("egd", {"kernels": "compiled"}, "only eager passes are written for egd"),
        ("lamb", {"betas": (0.9, 1.0)}, "betas is"),
        ("adamw", {"epsilon": 0}, "epsilon is 0"),
        ("adamw", {"per_tensor": {"cub": {"weight_decay": 0}}}, "'cub' matches no tensor"),
        ("adamw", {"per_tensor": {"cube": {"decay": 0}}}, "unknown 'decay'"),
        ("adamw", {"per_tensor": {"cube": {"weight_decay": -1}}}, "'cube': weight_decay is -1"),
        ("lamb", {"clip_global_norm": 0}, "clip_global_norm is 0"),
        *(
            ("adafactor", {key: "flase"}, f"{key} is 'flase', expected true or false")
            for key in (
                "parameter_scale",
                "relative_step",
                "inverse_sqrt_cap",
                "skip_nonfinite",
                "statistics",
            )
        ),
        (
            "adamw",
            {"bias_correction": 1, "skip_nonfinite": "no"},
            "correction is 1.*\nadamw: skip_nonfinite is",
        ),
        ("egd", {"normalise": None}, "normalise is None, expected true or false"),
        ("lamb", {"guard_window": 10}, "guard_window has no effect without update_guard: leave it out"),
        ("lamb", {"guard_window": math.inf}, "guard_window is inf, expected a whole number"),
        ("adafactor", {"clip_threshold": "none"}, "'none', expected a number, or null: off"),
        ("adafactor", {"momentum": True}, "momentum is True, expected a number"),
        ("adafactor", {"preset": ["paper"]}, "is unknown"),
        ("lamb", {"betas": 0.9}, "betas is 0.9, expected two numbers"),
        ("lamb", {"weight_decay": -1}, "weight_decay is -1"),
    ],
)
def test_wrong_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(name, parameters().items(), **settings)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_statistics_the_weights_are_the_same(name):
    own, other = parameters(), parameters()
    settings = {"learning_rate": 0.01, "weight_decay": 0.1}
    with_them, without = (
        standalone(name, own, **settings),
        standalone(name, other, statistics=False, **settings),
    )
    run(with_them, own, 3)
    run(without, other, 3)
    assert all(torch.equal(own[key], other[key]) for key in SHAPES)
    assert not column(with_them, "update_square_sum").isnan().any()
    assert column(without, "update_square_sum").isnan().all()
    assert not column(without, "grad_square_sum").isnan().any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_is_documented(name):
    text = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    assert [setting for setting in settings_of(name) if f"| `{setting}` |" not in text] == []
    assert [column for column in STATISTICS if f"`{column}`" not in text] == []


def test_sixteen_bit_parameters_without_masters_are_refused():
    with pytest.raises(FragmentError, match=r"torch\.bfloat16"):
        FragmentMap.whole([("weight", nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))])


def test_a_step_before_attach_is_refused_unless_it_is_the_engines_empty_one():
    own = parameters()
    optimizer = build_optimizer("adafactor", own.items())
    for parameter in own.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.updates == 0
    own["vector"].grad += 1
    with pytest.raises(RuntimeError, match="attach"):
        optimizer.step()
