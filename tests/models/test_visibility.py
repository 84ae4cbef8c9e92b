import math

import pytest
import torch

from sutrain.models.visibility import build_visibility, entropy_scale
from tests.models.tiny import CONFIGS


def test_a_token_sees_its_document_and_padding_sees_only_padding():
    visible = build_visibility(torch.tensor([[1, 1, 2, 0]]), CONFIGS["roformer_v2"], torch.float32)
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(visible.mask[0, 0] == 0, expected)
    assert (visible.mask[0, 0][~expected] == -math.inf).all()
    assert visible.score_scale is None


def test_softmax_plus_scales_by_the_length_of_each_document():
    documents = torch.tensor([[1] * 100 + [2] * 3 + [0] * 25])
    scale = build_visibility(documents, CONFIGS["gau_alpha"], torch.bfloat16).score_scale
    assert scale.dtype == torch.float32
    assert scale[0, 0, 0, 0] == pytest.approx(math.log(100) / math.log(512))
    assert scale[0, 100, 0, 0] == pytest.approx(math.log(16) / math.log(512))


def test_512_tokens_give_plain_softmax_and_entropy_hardly_grows_for_sharp_scores():
    assert entropy_scale(torch.tensor(512)) == 1.0
    plain, scaled = [], []
    for length in (64, 4096):
        scores = 5 * torch.randn(1000, 64) @ torch.randn(64, length) / 8
        for found, factor in ((plain, 1.0), (scaled, entropy_scale(torch.tensor(length)))):
            logarithm = torch.log_softmax(scores * factor, -1)
            found.append(-(logarithm.exp() * logarithm).sum(-1).mean().item())
    assert plain[1] - plain[0] > 1.0
    assert abs(scaled[1] - scaled[0]) < 0.3
