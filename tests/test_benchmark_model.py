"""The arithmetic of benchmarks/model.py: what is counted, what is timed, and which way a ratio goes."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sutrain.models.encoder
from benchmarks import model as benchmark
from benchmarks import model_peers
from benchmarks.model import SHAPES, Bench, available, parse
from benchmarks.model_peers import (
    BERT,
    CONTENDERS,
    GAU,
    OURS,
    bert,
    make_batch,
    modernbert,
    ours,
    recomputed_flops,
)
from benchmarks.model_steps import Runner, peak_tensor_bytes
from sutrain.models import tiles
from sutrain.models.configuration import GATED_ACTIVATIONS
from sutrain.models.encoder import Encoder
from sutrain.objectives import masked_lm
from sutrain.objectives.masked_lm import filled_up, predicted_positions

CPU = torch.device("cpu")
SHAPE = SHAPES["quick"]


def batch_of(layout: str, rows: int = 2, length: int = 64):
    return make_batch(layout, rows, length, SHAPE.vocab_size, CPU)


def counted(contender, batch) -> int:
    """bf16 and plain attention, of which the counter sees every product."""
    contender.model.bfloat16().train()
    with FlopCounterMode(display=False) as counter:
        contender.head(contender.trunk(batch), batch).backward()
    return counter.get_total_flops()


def plain_bert(shape, **settings):
    return bert(shape, attention="eager", **settings)


def plain_modernbert(shape):
    contender = modernbert(shape)
    contender.model.set_attn_implementation("eager")
    return contender


def idle_flops(contender, batch) -> int:
    """Of the last layer behind its attention where nothing is predicted, which only ours leaves out."""
    config = contender.config
    matrices = 3 if config.activation in GATED_ACTIVATIONS else 2
    inner = config.num_heads * config.value_size + matrices * config.feed_forward_size
    return 6 * config.hidden_size * inner * (batch.tokens - batch.predicted)


@pytest.mark.parametrize("build", [ours, CONTENDERS[GAU]], ids=["RoFormerV2", "GAU"])
def test_needed_flops_are_those_that_torch_counts(build, monkeypatch):
    monkeypatch.setattr(masked_lm, "POSITION_STEP", 1)
    batch, contender = batch_of("full"), build(SHAPE)
    assert counted(contender, batch) == pytest.approx(contender.flops(batch))


@pytest.mark.parametrize(
    "build",
    [lambda shape: plain_bert(shape, masked_head=True), plain_modernbert],
    ids=["BERT", "ModernBERT"],
)
def test_peers_of_one_document_a_row_compute_the_last_layer_in_full_besides(build):
    batch, contender = batch_of("full"), build(SHAPE)
    expected = contender.flops(batch) + idle_flops(contender, batch)
    assert counted(contender, batch) == pytest.approx(expected)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_ours_computes_needed_flops_alone(layout, monkeypatch):
    monkeypatch.setattr(sutrain.models.encoder, "worthwhile", lambda *_: True)  # always take rows apart
    batch, contender = batch_of(layout), ours(SHAPE)
    more = counted(contender, batch)  # attention's matrices to whole tiles, predicted tokens to a whole step
    monkeypatch.setattr(tiles, "WIDTH_STEP", 1)
    monkeypatch.setattr(masked_lm, "POSITION_STEP", 1)
    tiles.tiling.cache_clear()
    assert counted(contender, batch) == pytest.approx(contender.flops(batch))
    tiles.tiling.cache_clear()
    assert contender.flops(batch) < more < 1.3 * contender.flops(batch)
    assert contender.flops(batch) < ours(SHAPE).flops(batch_of("full"))


def test_scores_everywhere_are_not_needed():
    batch, contender = batch_of("full"), plain_bert(SHAPE)
    idle = batch.tokens - batch.predicted
    head = 6 * (SHAPE.hidden_size * SHAPE.vocab_size + SHAPE.hidden_size**2)
    expected = contender.flops(batch) + idle_flops(contender, batch) + idle * head
    assert counted(contender, batch) == pytest.approx(expected)


def test_a_local_window_is_needed_no_further_than_it_reaches():
    batch = make_batch("full", 1, 256, SHAPE.vocab_size, CPU)
    assert batch.seen() == 256
    assert batch.seen(128) == 129
    assert modernbert(SHAPE).windows == (0, 128, 128)


@pytest.mark.parametrize("together", [1, 4])
def test_flops_of_recomputation(together):
    encoder = Encoder(SHAPE).bfloat16()
    encoder.gradient_checkpointing, encoder.recompute_together = True, together
    batch = batch_of("full")
    with FlopCounterMode(display=False) as counter:
        encoder(batch.tokens_BL, batch.document_BL).sum().backward()
    assert counter.get_total_flops() == pytest.approx(recomputed_flops(SHAPE, 64) * batch.tokens)


@pytest.mark.parametrize("layout", ["padded", "packed", "full"])
def test_batches_are_what_they_say(layout):
    batch = batch_of(layout, rows=4)
    assert batch.tokens == int((batch.document_BL > 0).sum())
    sizes = [int((row == n).sum()) for row in batch.document_BL for n in range(1, int(row.max()) + 1)]
    assert sizes == batch.lengths
    assert (layout == "padded") == bool((batch.document_BL == 0).any())
    assert (layout == "packed") == (not batch.one_document_a_row)
    chosen = batch.labels_BL >= 0
    assert batch.predicted == int(chosen.sum()) > 0
    assert (batch.document_BL[chosen] > 0).all()
    assert torch.equal(batch.labels_BL[chosen], batch.tokens_BL[chosen])


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_documents_do_not_see_each_other_in_any_contender(name, layout):
    """Other tokens in the last document of each row, or where there is padding, change nothing in its first one."""
    torch.manual_seed(0)
    batch, contender = batch_of(layout), CONTENDERS[name](SHAPE)
    contender.model.eval()
    first = batch.document_BL == 1

    asked = filled_up(predicted_positions(batch.labels_BL))  # of ours

    def of_the_first():
        hidden = contender.trunk(batch)
        return hidden[first if hidden.dim() == 3 else first.flatten()[asked]]

    with torch.no_grad():
        before = of_the_first()
        batch.tokens_BL[~first] = 7
        after = of_the_first()
        batch.tokens_BL[0, 0] = 9
        changed = of_the_first()
    assert len(before) > 0
    assert torch.allclose(before, after, atol=1e-5)
    assert not torch.allclose(before, changed, atol=1e-5)


@pytest.mark.parametrize("build", [bert, modernbert])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_plain_and_fused_attention_of_a_peer_compute_the_same(build, layout, monkeypatch):
    """Which of them depends on the processor; documents are kept apart in both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batch, found = batch_of(layout), {}
    for units in ("none", "vectors", "tiles"):
        monkeypatch.setattr(model_peers, "bf16_units", lambda units=units: units)
        torch.manual_seed(0)
        contender = build(SHAPE)
        with torch.no_grad():
            hidden = contender.trunk(batch)
        found[units] = contender.model.config._attn_implementation, hidden[batch.document_BL > 0]
    assert [kind for kind, _ in found.values()] == ["sdpa", "eager", "sdpa"]
    torch.testing.assert_close(found["vectors"][1], found["none"][1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [OURS, BERT])
def test_the_cut_between_trunk_and_head_leaves_the_gradients(name):
    torch.manual_seed(0)
    runner = Runner(CONTENDERS[name](SHAPE), batch_of("packed"))
    contender = runner.contender
    contender.head(contender.trunk(runner.batch), runner.batch).backward()
    parameters = dict(contender.model.named_parameters())
    expected = {key: p.grad.float() for key, p in parameters.items() if p.grad is not None}
    before = {key: p.detach().clone() for key, p in parameters.items()}
    runner()
    assert {key for key, p in parameters.items() if p.grad is not None} == expected.keys()
    for key, gradient in expected.items():
        assert torch.allclose(parameters[key].grad.float(), gradient, rtol=0.02, atol=1e-4), key
        # A gain of 1 does not move in bf16 at this learning rate, a matrix does.
        assert gradient.dim() == 1 or not torch.equal(parameters[key], before[key]), f"no update of {key}"
    runner(), runner(), runner()
    assert len(runner.trunk_seconds) == 2 and all(seconds > 0 for seconds in runner.trunk_seconds)


def test_the_memory_of_a_step_is_seen():
    """A step that holds 64 MiB for a moment is noted with about as much."""
    runner = Runner(ours(SHAPE), batch_of("full"))
    head = runner.contender.head

    def wasteful(hidden, batch):
        held = torch.ones(2**24)
        return head(hidden, batch) + 0 * held.sum()

    runner.contender.head = wasteful
    runner(), runner()
    runner.contender.head = head
    runner.optimizer.zero_grad()
    least = peak_tensor_bytes(runner.device, runner.step)
    assert least > sum(p.nbytes for p in runner.contender.model.parameters())  # gradients are the step's
    assert runner.tensor_bytes - least == pytest.approx(64 * 2**20, rel=0.1)
    assert 64 * 2**20 <= runner.resident_bytes < 192 * 2**20


@pytest.fixture
def bench(monkeypatch):
    """A bench whose clock is ours: seconds by name of the contender."""

    class Clocked(Bench):
        seconds: dict[str, float]

        def turns(self, steps):
            for step in steps.values():
                for _ in range(3):
                    step()
            return {name: [self.seconds[name]] * 3 for name in steps}

    monkeypatch.setattr(benchmark, "matmul_rate", lambda device: 1e12)
    return Clocked(parse(["--quick", "--output", "elsewhere.json"]))


def test_ratios_against_peers_say_how_much_faster_ours_is(bench):
    bench.seconds = dict.fromkeys(CONTENDERS, 1.0) | {BERT: 1.5}
    found = {entry["name"]: entry for entry in benchmark.peers(bench)}
    for layout in ("padded", "packed"):
        assert found[f"roformer_v2_vs_bert_quick_{layout}_64"]["value"] == 1.5
        assert found[f"roformer_v2_vs_modernbert_quick_{layout}_64"]["value"] == 1.0
        (row,) = [r for r in bench.table if (r["batch"], r["model"]) == (f"quick, {layout} 64", BERT)]
        batch = batch_of(layout)
        assert row["step tokens/s"] == pytest.approx(batch.tokens / 1.5, rel=1e-3)
        assert row["GFLOP/s"] == pytest.approx(bert(SHAPE).flops(batch) / 1.5 / 1e9, rel=1e-3)
        assert row["of matmul"] == pytest.approx(row["GFLOP/s"] / 1000, rel=1e-2)


def test_two_may_race_alone(bench):
    bench.seconds, bench.options.beside = {OURS: 1.0, BERT: 1.5}, [BERT]
    found = {entry["name"]: entry["value"] for entry in benchmark.peers(bench)}
    assert {name for name in found if "trunk" not in name} == {
        f"roformer_v2_vs_bert_quick_{layout}_64" for layout in ("padded", "packed")
    }


def test_the_goal_of_gau_takes_the_worse_length(bench):
    bench.seconds = {OURS: 3.0, GAU: 2.0}
    found = {entry["name"]: entry for entry in benchmark.long(bench)}
    goal = found["gau_vs_roformer_v2_long"]
    assert (goal["value"], goal["goal"], goal["better"]) == (1.5, 1.0, "higher")
    memory = [found[f"gau_vs_roformer_v2_{length}_memory"]["value"] for length in (96, 128)]
    assert found["gau_vs_roformer_v2_long_memory"]["value"] == max(memory)


def test_growth_of_flash_is_the_long_step_over_the_short_one(bench):
    bench.seconds = {"64": 2.0, "512": 17.0}
    found = {entry["name"]: entry for entry in benchmark.flash(bench)}
    assert found["flash_length_growth"]["value"] == 8.5
    assert found["flash_length_growth"]["goal"] == 9.0


def test_depth_is_judged_by_time_per_flop(bench):
    bench.seconds = {
        "24": benchmark.REPEATS * 24 * 0.01,
        "48": 48 * 0.01 * 1.2,
    }  # a fifth longer than its FLOPs ask for
    (found,) = benchmark.depth(bench)
    assert found["name"] == "deepnet_1000_vs_flops"
    assert found["value"] == pytest.approx(1.2)


def test_without_a_gpu_its_shares_are_not_measured(bench):
    found = list(benchmark.gpu_shares(bench, 1e12))
    assert [(entry["value"], entry["goal"]) for entry in found] == [(None, 0.5), (None, 0.4)]


def test_a_gpu_gets_batches_that_keep_it_busy():
    assert parse(["--device", "cuda"]).tokens == 16384 and parse(["--device", "cpu"]).tokens == 2048
    assert parse(["--device", "cuda", "--tokens", "512"]).tokens == 512


def test_a_quick_run_does_not_replace_results():
    with pytest.raises(SystemExit):
        parse(["--quick"])


def test_a_run_keeps_what_an_earlier_one_found(tmp_path, monkeypatch):
    """With the real clock: two groups one after the other into one file."""
    monkeypatch.setattr(benchmark, "matmul_rate", lambda device: 1e12)
    output = tmp_path / "model.json"
    for group in ("flash", "long"):
        benchmark.main(["--quick", "--only", group, "--output", str(output)])
    content = json.loads(output.read_text())
    names = [entry["name"] for entry in content["results"]]
    assert names[:2] == ["flash_length_growth", "flash_memory_growth"]
    assert "gau_vs_roformer_v2_long" in names and len(names) == len(set(names))
    assert len(content["commands"]) == 2 and len(content["table"]) == 8
    assert all(row["step tokens/s"] > 0 for row in content["table"])


def test_compile_without_a_name_means_everybody_and_notes_say_whose_layers_were():
    everybody = parse(["--compile"]).compile
    assert everybody == list(benchmark.CONTENDERS) and parse([]).compile == []
    only = parse(["--compile", benchmark.OURS])
    assert only.compile == [benchmark.OURS]
    bench = Bench.__new__(Bench)
    for compiled, note in (
        (everybody, ", both compiled"),
        (only.compile, f", {benchmark.OURS} compiled"),
        ([], ""),
    ):
        only.compile, bench.options = compiled, only
        assert bench.compiled(benchmark.OURS, benchmark.GAU) == note
