"""A fused parameter counts as the tensors it is made of."""

import pytest
import torch
from torch import nn

from sutrain.optim import STATISTICS, FragmentMap, build_optimizer
from sutrain.optim.logical import runs_of_parts

PARTS = {"query": (8, 6), "key": (8, 6), "value": (4, 6)}


def values(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * scale * 4.0**position
        for position, (name, shape) in enumerate(PARTS.items())
    }


def attached(name, parameters, **settings):
    optimizer = build_optimizer(name, parameters.items(), learning_rate=0.05, weight_decay=0.1, **settings)
    optimizer.attach(FragmentMap.whole(parameters.items()))
    return optimizer


@pytest.mark.parametrize("name", ["adafactor", "lamb", "adamw"])
def test_a_fused_matrix_is_trained_as_its_parts_are(name):
    """Also where parts differ in size; as one tensor, AdaFactor and LAMB do something else."""
    apart = {part: nn.Parameter(value) for part, value in values(0).items()}
    fused = {"qkv": nn.Parameter(torch.cat(list(values(0).values())))}
    glued = {"qkv": nn.Parameter(torch.cat(list(values(0).values())))}
    momentum = {"momentum": 0.9} if name == "adafactor" else {}
    three = attached(name, apart, per_tensor={"value": {"learning_rate_scale": 0.5}}, **momentum)
    logical = attached(
        name, fused, logical_tensors={"q*": [8, 8, 4]}, per_tensor={"qkv#2": {"learning_rate_scale": 0.5}},
        **momentum,
    )  # fmt: skip
    one = attached(name, glued, **momentum)
    for step in range(5):
        gradients = values(10 + step, 0.1)
        for part, gradient in gradients.items():
            apart[part].grad = gradient.clone()
        for whole in (fused, glued):
            whole["qkv"].grad = torch.cat(list(gradients.values()))
        for optimizer in (three, logical, one):
            optimizer.step()
        torch.testing.assert_close(logical.statistics, three.statistics, rtol=1e-5, atol=1e-9, equal_nan=True)
    expected = torch.cat([parameter.detach() for parameter in apart.values()])
    torch.testing.assert_close(fused["qkv"].detach(), expected, rtol=1e-6, atol=1e-7)
    assert logical.tensor_names == ["qkv#0", "qkv#1", "qkv#2"]
    assert logical.statistics[:, STATISTICS.index("numel")].tolist() == [48, 48, 24]
    if name != "adamw":
        assert (glued["qkv"].detach()[:16] - expected[:16]).abs().max() > 1e-3


def test_moments_are_stored_under_the_parameter():
    """So that a run can begin or stop to count a parameter as several tensors."""
    fused = {"qkv": nn.Parameter(torch.cat(list(values(0).values())))}
    optimizer = attached("lamb", fused, logical_tensors={"qkv": [8, 8, 4]})
    places = [(key, name, offset, len(held)) for key, name, offset, held in optimizer.state_by_name().sliced]
    expected = [("qkv", 0, 48), ("qkv", 48, 48), ("qkv", 96, 24)]
    assert places == [(key, *place) for key in ("first_moment", "second_moment") for place in expected]


def test_a_run_of_elements_falls_into_the_parts_it_crosses():
    shape = torch.Size((20, 6))
    assert runs_of_parts(shape, [8, 8, 4], 47, 51) == [(0, 47, 1, 0), (1, 0, 48, 1), (2, 0, 2, 49)]
    assert runs_of_parts(shape, [8, 8, 4], 50, 10) == [(1, 2, 10, 0)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kqv": 3}, "'kqv' matches no tensor; names are like qkv"),
        ({"qkv": 3}, "3 does not divide the 20 rows of qkv"),
        ({"qkv": [8, 8]}, r"\[8, 8\] does not divide the 20 rows"),
        ({"qkv": "three"}, "expected a number of parts or a list of rows"),
        ({"qkv": 0}, "expected a number of parts or a list of rows"),
    ],
)
def test_parts_that_do_not_fit_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer("lamb", [("qkv", nn.Parameter(torch.zeros(20, 6)))], logical_tensors=spec)
