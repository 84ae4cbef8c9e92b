import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sutrain.models import attention, gates, gau
from sutrain.models.configuration import EncoderConfig
from sutrain.models.encoder import Encoder
from sutrain.models.gates import Promise, gated_output, project
from sutrain.models.init import Linear
from sutrain.models.visibility import build_visibility


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_a_gated_output_keeps_gate_and_value_alone(activation):
    gate, x = (torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    output = torch.nn.Linear(3, 4, dtype=torch.float64)
    inputs = (gate, x, *output.parameters())
    expected = F.linear(activation(gate) * x, output.weight, output.bias)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        found = gated_output(output, activation, x, Promise(gate))
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    )
    wide = [t for t in held if t.shape == gate.shape]
    assert {t.data_ptr() for t in wide} == {gate.data_ptr(), x.data_ptr()}


def test_no_product_is_made_twice():
    gate, x = (torch.randn(2, 5, 3, requires_grad=True) for _ in range(2))
    output = torch.nn.Linear(3, 4, bias=False)
    calls = []
    output.register_forward_pre_hook(lambda module, inputs: calls.append("begun"))
    output.register_forward_hook(lambda module, inputs, out: calls.append("done"))
    gated_output(output, F.silu, x, Promise(gate)).sum().backward()
    assert calls == ["begun", "done", "begun"]  # ends where its input is there again


class Adapted(torch.nn.Module):
    """A map with another of low rank beside it, which sees a part of the input: LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base, self.dropout = base, torch.nn.Dropout(0.5)
        self.down = torch.nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.up = torch.nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


def test_an_adapter_drops_the_same_when_it_is_computed_again():
    gate, x = (torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    output = Adapted(torch.nn.Linear(3, 4, dtype=torch.float64))
    inputs, found = (gate, x, *output.parameters()), []
    for product in (lambda: output(F.silu(gate) * x), lambda: gated_output(output, F.silu, x, Promise(gate))):
        torch.manual_seed(1)
        out = product()
        torch.manual_seed(2)
        found.append(torch.autograd.grad(out.square().sum(), inputs))
    torch.testing.assert_close(*found)


@pytest.fixture
def promised(monkeypatch):
    """Gates and values are projected again, whatever the length of rows."""
    monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", 1)
    monkeypatch.setattr(gates, "VALUES_AGAIN_FROM_TOKENS", 1)


def gated(projection, output, x):
    gate, value, shared = project(projection, x, (6, 6, 2), promised=2)
    return gated_output(output, F.silu, value.kept() * shared.kept().square().sum(-1, keepdim=True), gate)


def unit(bias, dtype=torch.float64):
    torch.manual_seed(0)
    projection = Linear("gau_input", 5, 14, bias, parts=(6, 6, 2)).to(dtype)
    x = torch.randn(2, 7, 5, dtype=dtype, requires_grad=True)
    return projection, torch.nn.Linear(6, 4, dtype=dtype), x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("computed_again", [False, True])
def test_a_promised_gate_changes_no_number(promised, bias, computed_again):
    projection, output, x = unit(bias)
    inputs = (x, *projection.parameters(), *output.parameters())
    gate, value, shared = projection(x).split(projection.parts, dim=-1)
    expected = output(F.silu(gate) * value * shared.square().sum(-1, keepdim=True))
    found = gated(projection, output, x)
    if computed_again:
        found = checkpoint(gated, projection, output, x, use_reentrant=False)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    of_promise, of_gate = (torch.autograd.grad(y, inputs, direction) for y in (found, expected))
    assert all(gradient.abs().max() > 0.1 for gradient in of_gate)
    torch.testing.assert_close(of_promise, of_gate)


def kept_bytes(run, *modules):
    """Of all storages that autograd keeps beside the weights."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    return sum(t.untyped_storage().nbytes() for address, t in held.items() if address not in weights)


def test_a_promised_gate_takes_no_memory(monkeypatch):
    """Neither by itself, nor inside of what is computed again as a whole."""
    projection, output, x = unit(bias=True)
    weights = projection, output
    plain = kept_bytes(lambda: gated(*weights, x), *weights)
    monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", 7)
    gate_bytes = x.numel() // 5 * 6 * 8
    # A projection's parts lie in one storage: with the gate goes a third, and a promise is a single number.
    assert plain - kept_bytes(lambda: gated(*weights, x), *weights) == gate_bytes - 8
    whole = kept_bytes(lambda: checkpoint(gated, *weights, x, use_reentrant=False), *weights)
    assert whole == x.untyped_storage().nbytes()


def test_where_a_gate_is_not_promised(monkeypatch):
    projection, _, x = unit(bias=False)
    monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", 8)
    assert project(projection, x, (6, 8), 1)[0].x_BLD is None  # short rows
    monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", 7)
    assert project(projection, x, (6, 8), 1)[0].x_BLD is not None
    with torch.no_grad():
        assert project(projection, x, (6, 8), 1)[0].x_BLD is None  # nothing is kept
    assert (
        project(projection.eval(), x, (6, 8), 1)[0].x_BLD is None
    )  # nobody trains, but somebody may torch.export
    projection.train()
    for register in (projection.register_forward_hook, projection.register_full_backward_hook):
        hook = register(lambda *_: None)
        assert (
            project(projection, x, (6, 8), 1)[0].x_BLD is None
        )  # somebody wants to see all that it computes
        hook.remove()
    assert project(projection, x, (6, 8), 1)[0].x_BLD is not None
    adapted = torch.nn.Sequential(
        projection
    )  # without a weight of its own, as adapters and quantised maps have none
    assert project(adapted, x, (6, 8), 1)[0].x_BLD is None
    projection.weight.ds_id = 0  # ZeRO-3 holds the weights elsewhere
    assert project(projection, x, (6, 8), 1)[0].x_BLD is None


def test_under_autocast_gradients_have_the_dtypes_of_the_weights(promised):
    projection, output, x = unit(bias=True, dtype=torch.float32)
    inputs = (x, *projection.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = gated(projection, output, x)
    assert found.dtype == torch.bfloat16
    of_promise = torch.autograd.grad(found.float().square().sum(), inputs)
    gate, value, shared = projection(x).split(projection.parts, dim=-1)
    exact = output(F.silu(gate) * value * shared.square().sum(-1, keepdim=True))
    of_gate = torch.autograd.grad(exact.square().sum(), inputs)
    for one, other in zip(of_promise, of_gate, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.03 * other.norm()


def test_frozen_weights_and_inputs_without_gradient(promised):
    projection, output, x = unit(bias=True)
    gradients, flops = [], []
    for frozen in (False, True):
        loss = gated(projection.requires_grad_(not frozen), output, x).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
        gradients.append(x.grad)
        x.grad = None
    torch.testing.assert_close(*gradients)
    assert (
        flops[0] - flops[1] == 2 * x[..., 0].numel() * projection.weight.numel()
    )  # no product for what is frozen
    projection.requires_grad_(True).zero_grad()
    gated(projection, output, x.detach()).sum().backward()
    assert projection.weight.grad is not None


def small(mixer="gau", **changes):
    """Three gated units, of which one is the lowest third."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "gau_expansion_size": 32, "gau_key_size": 8}
    sizes |= {"num_layers": 3, "max_row_tokens": 32, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return EncoderConfig(mixer=mixer, initialisation="gau_alpha", **sizes | changes)


@pytest.mark.parametrize("values_from", [1, 2048])
@pytest.mark.parametrize(
    ("mixer", "changes"),
    [
        ("gau", {"score_normaliser": "softmax_plus"}),
        ("gau", {"score_normaliser": "relu_squared"}),
        ("flash", {"score_normaliser": "relu_squared", "flash_chunk_size": 4}),
    ],
)
def test_models_with_promised_gates_and_pairs_made_again(monkeypatch, mixer, changes, values_from):
    """Whole encoders on packed rows: the same hidden vectors and gradients."""
    torch.manual_seed(0)
    encoder = Encoder(small(mixer, **changes)).double()
    tokens = torch.randint(5, 50, (2, 32))
    documents = torch.tensor([[1] * 11 + [2] * 21, [1] * 20 + [2] * 9 + [0] * 3])
    direction = torch.randn(2, 32, 16, dtype=torch.float64) * (documents > 0).unsqueeze(-1)
    found = {}
    for again in (False, True):
        if again:
            monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", 1)
            monkeypatch.setattr(gates, "VALUES_AGAIN_FROM_TOKENS", values_from)
            monkeypatch.setattr(attention, "SCORES_AGAIN_FROM_TOKENS", 1)
        hidden = encoder(tokens, documents)
        gradients = torch.autograd.grad((hidden * direction).sum(), list(encoder.parameters()))
        found[again] = (hidden * (documents > 0).unsqueeze(-1), *gradients)
    assert all(x.abs().max() > 1e-3 for x in found[False])
    torch.testing.assert_close(found[True], found[False])


def test_on_shorter_rows_the_lowest_third_alone_promises_its_values(monkeypatch):
    monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", 32)
    monkeypatch.setattr(attention, "SCORES_AGAIN_FROM_TOKENS", 32)
    layers, x = Encoder(small()).layers, torch.randn(1, 32, 16, requires_grad=True)
    visible = build_visibility(torch.ones(1, 32, dtype=torch.long), small(), torch.float32)

    def kept():
        return [
            kept_bytes(lambda layer=layer: layer.mixer.finish(layer.mixer(x, visible)), layer)
            for layer in layers
        ]

    low, *above = kept()
    value_bytes = 32 * 32 * 4
    assert above == [low + value_bytes - 4] * 2  # and none of the number that stands for a value
    monkeypatch.setattr(gates, "VALUES_AGAIN_FROM_TOKENS", 32)
    assert kept() == [low] * 3


@pytest.mark.parametrize("values_from", [1, 2048])
def test_compiled_layers_get_no_gradients_to_copy_and_none_of_zeros(promised, monkeypatch, values_from):
    """Between compiled parts of a layer attention stands by itself. Its gradients have to lie in memory as its inputs
    do, to the stride of the one head, and only of these three are there gradients."""
    monkeypatch.setattr(gates, "VALUES_AGAIN_FROM_TOKENS", values_from)
    monkeypatch.setattr(attention, "SCORES_AGAIN_FROM_TOKENS", 1)
    inputs, gradients = [], []

    def seen(query, key, value, visible, dropout, squared, source):
        for x in (query, key, value):
            inputs.append(x.stride())
            x.register_hook(lambda gradient: gradients.append(gradient.stride()))
        assert [x for x in source.tensors if x is not None and x.requires_grad] == []
        return attention.attend_silu(query, key, value, visible, dropout, squared, source)

    monkeypatch.setattr(gau, "attend_silu", seen)
    for rows in (1, 2):
        Encoder(small(num_layers=1))(torch.randint(5, 50, (rows, 32))).square().sum().backward()
    assert gradients and sorted(gradients) == sorted(inputs)


def test_under_autocast_a_unit_on_long_rows_trains(promised, monkeypatch):
    """The backward pass makes the value again outside of autocast, in the dtype that it had."""
    monkeypatch.setattr(attention, "SCORES_AGAIN_FROM_TOKENS", 1)
    torch.manual_seed(0)
    encoder, tokens, direction = Encoder(small()), torch.randint(5, 50, (2, 32)), torch.randn(2, 32, 16)
    exact = torch.autograd.grad((encoder(tokens) * direction).sum(), list(encoder.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = encoder(tokens)
    found = torch.autograd.grad((hidden.float() * direction).sum(), list(encoder.parameters()))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() < 0.1 * other.norm()
