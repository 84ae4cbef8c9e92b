"""The optimizers under real DeepSpeed engines, 1, 2, 3 and 4 processes over gloo, against a float64
reference."""

import json
from pathlib import Path

import numpy as np
import pytest

from sutrain.optim import STATISTICS
from tests import warm
from tests.optim import problem, reference
from tests.optim.problem import (
    ENGINES,
    MOVES,
    OPTIMIZERS,
    PARAMETERS,
    SHAPES,
    STEPS,
    cases,
    engines,
    tensors_of,
)

HERE = Path(__file__).parent
WORLDS = (1, 4, 3, 2)  # two comes last: it loads what the others saved
CASES = [(world_size, *case) for world_size in sorted(WORLDS) for case in cases(world_size)]
SAVED_AT = 10
ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}


def wrapper_of(engine):
    """DeepSpeed's optimizer for an engine: every kind it has for us must be among ENGINES."""
    kind = ENGINES[engine]
    if kind.stage == 0:
        return "AdaFactor" if kind.precision == "fp32" else "FP16_UnfusedOptimizer"
    if kind.stage == 3:
        return "DeepSpeedZeroOptimizer_Stage3"
    bf16_optimizer = engine == "stage1_bf16_accumulate_fp32"
    return "BF16_Optimizer" if bf16_optimizer else "DeepSpeedZeroOptimizer"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run all cases once: one launch per world size. Returns the folder that holds world1, world2, …"""
    output = tmp_path_factory.mktemp("zero")
    for world_size in WORLDS:
        finished = warm.run(HERE / "zero_worker.py", output, ranks=world_size, seconds=900)
        assert finished.returncode == 0, finished.stdout[-9000:]
    return output


@pytest.fixture(scope="module")
def expected():
    """Reference runs by case and number of updates, computed once each."""
    return {(case, steps): reference.run(case, steps) for case in OPTIMIZERS for steps in (SAVED_AT, STEPS)}


class Outcome:
    """What the ranks of one case wrote, put together."""

    def __init__(self, results: Path, world_size: int, case: str):
        files = sorted((results / f"world{world_size}").glob(f"{case}.rank*.npz"))
        assert len(files) == world_size
        self.ranks = [np.load(file) for file in files]
        self.masters = self.assemble("master")
        self.statistics = [rank["statistics"] for rank in self.ranks]

    def assemble(self, key: str) -> dict[str, np.ndarray]:
        """Whole tensors from the slices of all ranks; every element must come exactly once."""
        values, seen = {}, {}
        for rank in self.ranks:
            for stored in rank.files:
                if stored.startswith(f"{key}|"):
                    name, offset = stored[len(key) + 1 :].rsplit("|", 1)
                    size = int(np.prod(PARAMETERS[name]))
                    flat = values.setdefault(name, np.full(size, np.nan))
                    count = seen.setdefault(name, np.zeros(size, dtype=int))
                    begin, data = int(offset), rank[stored]
                    flat[begin : begin + len(data)] = data
                    count[begin : begin + len(data)] += 1
        assert all((count == 1).all() for count in seen.values())
        return taken_apart({name: flat.reshape(PARAMETERS[name]) for name, flat in values.items()})

    def replicated(self) -> dict[str, np.ndarray]:
        first = {
            k.split("|", 1)[1]: self.ranks[0][k] for k in self.ranks[0].files if k.startswith("replicated|")
        }
        for rank in self.ranks:
            for key, value in first.items():
                assert np.array_equal(rank[f"replicated|{key}"], value), f"{key} differs between ranks"
        return first

    def counters(self) -> list[dict]:
        return [json.loads(str(rank["counters"])) for rank in self.ranks]


def taken_apart(by_parameter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logical tensors of whole parameters."""
    found = {}
    for parameter, value in by_parameter.items():
        names = tensors_of(parameter)
        found |= dict(zip(names, np.split(value, len(names)), strict=True))
    return found


def relative_error(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Largest difference of any element, relative to the largest element of its tensor."""
    assert set(found) == set(wanted)
    return max(float(np.abs(found[n] - wanted[n]).max() / np.abs(wanted[n]).max()) for n in wanted)


@pytest.mark.parametrize(("world_size", "engine", "optimizer"), CASES)
def test_twenty_updates_equal_the_reference(results, expected, world_size, engine, optimizer):
    weights, _, history = expected[optimizer, STEPS]
    outcome = Outcome(results, world_size, f"{engine}.{optimizer}")

    assert relative_error(outcome.masters, weights) < 1e-5
    if engine != "stage0_fp32":  # which has no wrapper
        assert outcome.ranks[0]["wrapper"] == wrapper_of(engine)
    for counters in outcome.counters():
        assert (counters["updates"], counters["skipped_updates"]) == (STEPS, 0)
        assert ("loss_scale" in counters) == ("fp16" in engine)

    columns = columns_of(history)
    for statistics in outcome.statistics:  # of every rank
        np.testing.assert_array_equal(statistics, outcome.statistics[0])
        np.testing.assert_allclose(statistics, columns, rtol=2e-5, atol=1e-12)  # of squares: norms to 1e-5

    for rank in outcome.ranks:  # the model computes with the masters, rounded, on every rank
        model = taken_apart({name: rank[f"model|{name}"] for name in PARAMETERS})
        for name, master in outcome.masters.items():
            bound = ROUNDING[ENGINES[engine].precision] * np.abs(master).max()
            assert np.abs(model[name] - master).max() <= bound
        assert (rank["model|frozen"] == 1).all()


def columns_of(history):
    """Expected statistics, [steps, tensors, columns]."""
    return np.array([[[step[name][c] for c in STATISTICS] for name in SHAPES] for step in history])


@pytest.mark.parametrize(("world_size", "engine", "optimizer"), CASES)
def test_state_is_of_whole_tensors(results, expected, world_size, engine, optimizer):
    state = expected[optimizer, STEPS][1]
    outcome = Outcome(results, world_size, f"{engine}.{optimizer}")
    replicated = outcome.replicated()
    for key, value in replicated.items():
        np.testing.assert_allclose(value, state[key], rtol=1e-5, err_msg=key)
    for key in ("second_moment", "first_moment", "momentum"):
        for name, value in outcome.assemble(f"state|{key}").items():
            # moments pass through zero: compare with the size of the tensor
            assert np.abs(value - state[f"{key}|{name}"]).max() < 1e-5 * np.abs(state[f"{key}|{name}"]).max()
    if optimizer == "adafactor":  # sub-linear: rows + columns of each matrix of the last two dimensions
        assert sum(value.size for value in replicated.values()) == (
            (10 + 6) + (7 + 13) + 3 * (5 + 4) + (40 + 11) + 3 * (4 + 4)
        )
        assert set(outcome.assemble("state|second_moment")) == {"vector", "single"}


def owners(results, world_size, engine):
    """({tensor: ranks that own a part of it}, how many of those parts begin inside a row)."""
    found: dict[str, list[int]] = {name: [] for name in PARAMETERS}
    cuts = 0
    for rank, data in enumerate(Outcome(results, world_size, f"{engine}.adafactor").ranks):
        for entry in data["owned"]:
            name, offset, _ = str(entry).split("|")
            found[name].append(rank)
            cuts += int(offset) % PARAMETERS[name][-1] != 0
    return found, cuts


def test_the_layout_is_as_hard_as_it_claims(results):
    """Tensors over three ranks and more, ranks that own nothing of some, boundaries inside rows, sub-groups."""
    flat, cuts = owners(results, 3, "stage1_bf16")
    assert flat["wide"] == [0, 1, 2] and flat["embedding"] == [0] and cuts >= 2
    cut, cuts = owners(results, 4, "stage3_bf16")
    assert cut["wide"] == [0, 1, 2, 3] and cut["vector"] == [0, 1, 2] and cut["single"] == [0] and cuts >= 10
    for world_size in WORLDS:
        buffers = {
            engine: int(Outcome(results, world_size, f"{engine}.adafactor").ranks[0]["buffers"])
            for engine in engines()
            if ENGINES[engine].stage == 3
        }
        assert buffers.pop("stage3_bf16_uncut") == 1
        assert min(buffers.values()) >= 3, f"sub-groups of ZeRO-3: {buffers}"


def test_fp16_takes_part():
    if not problem.FP16_ON_CPU:
        pytest.skip("DeepSpeed has no fp16 on this processor")
    assert any(ENGINES[engine].precision == "fp16" for engine in engines())


def test_stock_adafactor_under_zero_is_not_adafactor(results):
    """The reason this package exists: the same check fails for torch.optim.Adafactor on two ranks."""
    weights = {name: problem.start(name) for name in SHAPES}
    state: dict[str, np.ndarray] = {}
    plain = {"learning_rate_scale": 1.0, "weight_decay": 0.0, "adapt": True}
    for step in range(1, STEPS + 1):
        for name in SHAPES:
            gradient = problem.mean_gradient(step, name)
            lr = min(problem.LEARNING_RATE, step**-0.5)
            weights[name] = reference.adafactor(weights[name], gradient, name, step, lr, plain, {}, state)[0]
    assert relative_error(Outcome(results, 2, "stock_adafactor").masters, weights) > 0.05


def test_one_wrong_row_statistic_is_seen(results, expected):
    """The bound is tight: one per cent on one row of one tensor, half way, breaks it."""
    weights = expected["adafactor", STEPS][0]
    assert relative_error(Outcome(results, 2, "perturbed").masters, weights) > 1e-5


@pytest.mark.parametrize("move", MOVES)
def test_other_worlds_and_stages_go_on_where_one_stopped(results, expected, move):
    """The loaded state is the saved one bit for bit, and the next steps are the uninterrupted run's."""
    from_world, from_engine, to_world, _, optimizer = MOVES[move]
    saved = Outcome(results, from_world, f"{from_engine}.{optimizer}.saved")
    loaded = Outcome(results, to_world, f"{move}.loaded")
    for name, value in saved.masters.items():
        assert np.array_equal(loaded.masters[name], value)
    for key in ("first_moment", "second_moment", "momentum"):
        before, after = saved.assemble(f"state|{key}"), loaded.assemble(f"state|{key}")
        assert set(before) == set(after)
        assert all(np.array_equal(before[name], after[name]) for name in before)
    before, after = saved.replicated(), loaded.replicated()
    assert set(before) == set(after)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert loaded.counters() == [saved.counters()[0]] * to_world
    assert loaded.counters()[0]["updates"] == SAVED_AT

    weights, _, history = expected[optimizer, STEPS]
    resumed = Outcome(results, to_world, f"{move}.resumed")
    assert relative_error(resumed.masters, weights) < 1e-5
    columns = columns_of(history)[SAVED_AT:]
    np.testing.assert_allclose(resumed.statistics[0], columns, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("engine", engines())
def test_accumulation_and_an_update_that_is_not_finite(results, expected, engine):
    """Two micro-batches a rank, each with another gradient: the mean of all four is what is updated with. After five
    updates one rank hands over an infinite gradient: weights, state and counters do not notice (the worker itself looks
    at the loss scale, which halves)."""
    weights, _, history = expected["adafactor", STEPS]
    outcome = Outcome(results, 2, f"accumulated.{engine}")
    assert relative_error(outcome.masters, weights) < 1e-5
    np.testing.assert_allclose(outcome.statistics[0], columns_of(history), rtol=2e-5, atol=1e-12)
    assert {counters["updates"] for counters in outcome.counters()} == {STEPS}


def test_the_engine_may_leave_gradient_norms_to_the_optimizer(results, expected):
    """Without compute_grad_norm and check_grad_overflow the engine saves two passes, and the optimizer sees,
    and skips, what is not finite."""
    outcome = Outcome(results, 2, "no_engine_norm")
    assert relative_error(outcome.masters, expected["adafactor", STEPS][0]) < 1e-5
    assert outcome.counters() == [{"updates": STEPS, "skipped_updates": 1}] * 2


@pytest.mark.parametrize("world_size", sorted(WORLDS))
def test_wrong_maps_and_engines_are_refused(results, world_size):
    said = json.loads((results / f"world{world_size}" / "refusals.json").read_text())
    assert "attach(FragmentMap.from_engine(engine))" in said["step before attach"]
    for engine in ("stage1_bf16", "stage3_bf16"):
        about = {key.removeprefix(f"{engine} "): text for key, text in said.items() if key.startswith(engine)}
        assert about["hole"].endswith("fused: elements 47..48 belong to no rank")
        assert "elements" in about["overlap"] or "several fragments" in about["overlap"]
        outside = engine == "stage3_bf16" and world_size == 1  # where its slice has nothing behind it
        assert ("embedding: found at 1..61 of" if outside else "is not where the map has it") in about[
            "shift"
        ]
        assert about["restored"] == "True"
        assert "state_by_name()" in about["state_dict"]
    assert "gradient_clipping is 1.0" in said["clipping and round robin"]
    assert "round_robin_gradients" in said["clipping and round robin"]
    assert "zero_quantized_weights and …_gradients round" in said["quantized"]
    if problem.FP16_ON_CPU:
        assert "never recovers from an overflow" in said["offload without way back"]
    assert "offload_param" in said["parameters away"]
    assert "odd" in said["forgotten parameter"]
    assert "per_tensor settings" in said["two parameter groups"]
    assert "pip install deepspeed==0.19.8" in said["another DeepSpeed"]
    others = ("step before attach", "restored", "state_dict")
    assert all(text.startswith("FragmentError") for key, text in said.items() if not key.endswith(others))
