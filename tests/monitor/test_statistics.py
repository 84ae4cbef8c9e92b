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
        ("transform.linear.bias", ("", "head")),
        ("transform.norm.weight", ("", "norm")),
        ("head_bias", ("", "head")),
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


def test_what_single_optimizers_know_is_weighted_by_elements():
    columns = (*COLUMNS, "update_rms", "clip_factor", "trust_ratio")
    sums = np.ones((5, 7))
    sums[:, 3] = [4, 4, 8, 20, 2]
    sums[1, 4:] = [3.0, 0.5, 1.0]  # 4 elements of layer 0's mixer
    sums[2, 4:] = [0.0, 1.0, 8.0]  # 8 elements of it
    sums[0, 4:] = np.nan
    table = two_layers().table(sums, columns, learning_rate=0.5)
    assert table.direction_rms[1] == pytest.approx(math.sqrt((4 * 9 + 8 * 0) / 12))
    assert table.clipped_share[1] == pytest.approx(4 / 12)
    assert table.trust_ratio[1] == pytest.approx(8 ** (8 / 12))
    assert np.isnan([table.direction_rms[2], table.clipped_share[2], table.trust_ratio[2]]).all()
    assert table.update_ratio_per_rate[0] == pytest.approx(table.update_ratio[0] / 0.5)
    assert set(table.as_columns()) == {"layer", "part", *table.known_columns()}
    plain = two_layers().table(np.ones((5, 4)), COLUMNS)
    assert plain.known_columns() == ("grad_norm", "weight_norm", "update_norm", "update_ratio")
    assert np.isnan(plain.update_ratio_per_rate).all()


def test_a_layer_that_stands_still_while_others_move_is_dead():
    layers = 6
    names = [f"encoder.layers.{i}.mixer.query.weight" for i in range(layers)]
    groups = TensorGroups(names, [(1,)] * layers)
    sums = np.ones((layers, 4))
    assert groups.table(sums, COLUMNS).dead_layers("mixer") == 0
    sums[2, 2] = 0
    sums[4, 2] = 1e-8
    assert groups.table(sums, COLUMNS).dead_layers("mixer") == 2
    sums[:, 2] = 0  # learning rate 0: nobody moves, nobody is dead
    assert groups.table(sums, COLUMNS).dead_layers("mixer") == 0
    sums[:, 2] = np.nan  # a skipped update
    assert groups.table(sums, COLUMNS).dead_layers("mixer") == 0
