"""Norms per layer and part, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from sutrain.monitor.statistics import TensorGroups, layer_and_part

COLUMNS = ("weight_square_sum", "grad_square_sum", "update_square_sum", "numel")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.embeddings.token.weight", ("", "embedding")),
        ("encoder.embeddings.token_type.weight", ("", "embedding")),
        ("encoder.embeddings.norm.weight", ("", "norm")),
        ("encoder.layers.0.mixer.query.weight", ("0", "mixer")),
        ("encoder.layers.11.feed_forward.down.weight", ("11", "feed_forward")),
        ("encoder.layers.999.mixer_norm.weight", ("999", "norm")),
        ("encoder.layers.3.feed_forward_norm.bias", ("3", "norm")),
        ("encoder.final_norm.weight", ("", "norm")),
        ("head.weight", ("", "head")),
        ("module.encoder.layers.3.mixer.query.weight", ("3", "mixer")),
        ("encoder.layers.3.residual.weight", None),
        ("encoder.something.weight", None),
    ],
)
def test_a_name_says_layer_and_part(name, expected):
    assert layer_and_part(name) == expected


def two_layers() -> TensorGroups:
    names = [
        "encoder.layers.1.mixer.query.weight",
        "encoder.layers.0.mixer.query.weight",
        "encoder.layers.0.mixer.value.weight",
        "encoder.embeddings.token.weight",
        "encoder.final_norm.weight",
    ]
    return TensorGroups(names, [(2, 2), (2, 2), (4, 2), (10, 2), (2,)])


def test_groups_are_in_reading_order_with_their_sizes():
    groups = two_layers()
    assert groups.keys == [("", "embedding"), ("0", "mixer"), ("1", "mixer"), ("", "norm")]
    assert groups.numel_G.tolist() == [20, 12, 4, 2]
    assert groups.layers == 2


def test_norms_by_hand():
    groups = two_layers()
    statistics = torch.tensor(
        #  weight² grad² update² numel
        [
            [16.0, 1.0, 4.0, 4.0],
            [9.0, 9.0, 0.09, 4.0],
            [16.0, 16.0, 0.16, 8.0],
            [400.0, 0.25, 1.0, 20.0],
            [0.0, 4.0, 1.0, 2.0],
        ]
    )
    table = groups.table(statistics, COLUMNS)
    np.testing.assert_allclose(table.weight_norm, [20, 5, 4, 0])
    np.testing.assert_allclose(table.grad_norm, [0.5, 5, 1, 2])
    np.testing.assert_allclose(table.update_norm, [1, 0.5, 2, 1], rtol=1e-6)
    np.testing.assert_allclose(table.update_ratio, [0.05, 0.1, 0.5, np.nan], rtol=1e-6)
    np.testing.assert_allclose(table.root_mean_square("weight_norm"), [20 / 20**0.5, 5 / 12**0.5, 2, 0])
    assert table.global_norms["weight_norm"] == pytest.approx(math.sqrt(441))
    assert table.global_norms["grad_norm"] == pytest.approx(math.sqrt(30.25))
    assert table.global_norms["update_norm"] == pytest.approx(math.sqrt(6.25))
    assert table.global_norms["update_ratio"] == pytest.approx(2.5 / 21)
    # Over depth: update norms 0.5 and 2 in layers 0 and 1, so the slope is log 4 / log 2.
    np.testing.assert_allclose(table.over_depth("update_norm", "mixer"), [0.5, 1.25, 2], rtol=1e-6)
    assert table.depth_slope("mixer") == pytest.approx(2.0)


def test_slope_of_a_power_law_over_many_layers():
    layers = 50
    names = [f"encoder.layers.{i}.mixer.query.weight" for i in range(layers)]
    groups = TensorGroups(names, [(1,)] * layers)
    depth = np.arange(1, layers + 1)
    sums = np.stack([np.ones(layers), np.ones(layers), (3 * depth**0.41) ** 2, np.ones(layers)], axis=1)
    assert groups.table(sums, COLUMNS).depth_slope("mixer") == pytest.approx(0.41)
    sums[7, 2] = np.nan  # a layer that was not measured is left out
    assert groups.table(sums, COLUMNS).depth_slope("mixer") == pytest.approx(0.41)


def test_nan_stays_in_its_group():
    sums = np.ones((5, 4))
    sums[2, 1] = np.nan
    table = two_layers().table(sums, COLUMNS)
    assert np.isnan(table.grad_norm).tolist() == [False, True, False, False]
    assert np.isfinite(table.update_norm).all()
    assert math.isnan(table.global_norms["grad_norm"])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"2 parameter\(s\) fit no part.*a\.b, c\.d"):
        TensorGroups(["a.b", "head.weight", "c.d"], [(1,)] * 3)
    with pytest.raises(ValueError, match="3 names but 1 shapes"):
        TensorGroups(["head.weight"] * 3, [(1,)])
    with pytest.raises(ValueError, match=r"shape \[4, 4\], expected \[5 tensors, 4 columns\]"):
        two_layers().table(np.ones((4, 4)), COLUMNS)
    with pytest.raises(ValueError, match=r"lack the column.*grad_square_sum"):
        two_layers().table(np.ones((5, 1)), ("weight_square_sum",))
