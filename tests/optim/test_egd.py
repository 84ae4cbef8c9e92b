"""Meta-learned step sizes against the post's formula, and doing what they are for."""

import math

import pytest
import torch
from torch import nn

from sutrain.optim import FragmentMap, build_optimizer

CURVATURE = torch.logspace(-2, 1, 50)


def descend(steps, **settings):
    """An ill-conditioned quadratic ½ Σ h θ², 50 dimensions; returns (last loss, least and largest ν)."""
    own = {"theta": nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))}
    optimizer = build_optimizer("egd", own.items(), learning_rate=0.01, **settings)
    optimizer.attach(FragmentMap.whole(own.items()))
    theta = own["theta"]
    for _ in range(steps):
        theta.grad = CURVATURE * theta.detach()
        optimizer.step()
    gains = {key: values.exp() for key, _, _, values in optimizer.state_by_name().sliced}["log_gain"]
    return 0.5 * float((CURVATURE * theta.detach() ** 2).sum()), gains.min().item(), gains.max().item()


def test_the_rule_of_the_post():
    """ν = exp(γ Σ g_{k-1} g_k), θ ← θ - η ν g, nothing normalised; float64, written out."""
    own = {"theta": nn.Parameter(torch.tensor([[0.5, -1.0, 2.0]]))}
    optimizer = build_optimizer("egd", own.items(), learning_rate=0.1, gain_rate=0.3, normalise=False)
    optimizer.attach(FragmentMap.whole(own.items()))
    theta, gain, before = [0.5, -1.0, 2.0], [1.0] * 3, [0.0] * 3
    for step in range(6):
        gradient = [math.sin((0.3 + 1.2 * i) * step + 1) * 0.9 for i in range(3)]
        own["theta"].grad = torch.tensor([gradient])
        optimizer.step()
        gain = [nu * math.exp(0.3 * b * g) for nu, b, g in zip(gain, before, gradient, strict=True)]
        theta = [t - 0.1 * nu * g for t, nu, g in zip(theta, gain, gradient, strict=True)]
        before = gradient
    assert own["theta"].detach().tolist()[0] == pytest.approx(theta, rel=1e-6)
    assert max(gain) > 1.2 > 0.9 > min(gain)


def test_a_higher_gain_rate_gets_further_on_an_ill_conditioned_quadratic():
    losses = [descend(300, gain_rate=rate)[0] for rate in (0.0, 0.01, 0.05, 0.5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]


def test_gains_stay_within_their_limits():
    _, low, high = descend(300, gain_rate=5.0, gain_limits=(0.5, 4.0))
    assert 0.5 * (1 - 1e-6) <= low <= high <= 4.0 * (1 + 1e-6)
    assert high > 3.9


def test_without_gain_rate_it_is_gradient_descent():
    own = {"theta": nn.Parameter(torch.ones(2, 3))}
    optimizer = build_optimizer("egd", own.items(), learning_rate=0.5, weight_decay=0.1, gain_rate=0.0)
    optimizer.attach(FragmentMap.whole(own.items()))
    own["theta"].grad = torch.full((2, 3), 0.25)
    optimizer.step()
    assert own["theta"].detach().view(-1).tolist() == pytest.approx([1 - 0.5 * 0.25 - 0.5 * 0.1] * 6)
