"""Every configuration of configs/pretrain: it is valid, its model is built, and every line says what it is."""

import re
from functools import cache

import pytest
import torch

from data_prep.config_file import load_config
from sutrain.config import PretrainConfig
from sutrain.models.configuration import parameter_count
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.monitor.statistics import TensorGroups
from tests.conftest import ROOT

SHIPPED = sorted((ROOT / "configs/pretrain").glob("*.yaml"))
PARAMETERS = {
    "roformer_v2_small": 15_225_600,
    "roformer_v2_base": 94_152_192,
    "roformer_v2_large": 314_279_936,
    "gau_alpha_base": 96_517_632,
    "gau_causal_base": 96_517_632,
}


@pytest.fixture(params=SHIPPED, ids=lambda path: path.stem)
def shipped(request):
    return request.param


def test_all_the_families_are_there():
    wanted = {"flash_base", "deepnet_100", "deepnet_1000", "bert_base", *PARAMETERS}
    assert wanted <= {path.stem for path in SHIPPED}


@cache
def built_from(path):
    """The model on the meta device: a thousand layers take seconds."""
    with torch.device("meta"):
        return MaskedLanguageModel(load_config(PretrainConfig, path).model)


def test_its_model_is_built_with_the_parameters_that_its_head_states(shipped):
    config = load_config(PretrainConfig, shipped)
    model = built_from(shipped)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == parameter_count(config.model)
    assert built == PARAMETERS.get(shipped.stem, built)
    stated = re.search(r"([\d,]{9,}) parameters", _head(shipped))
    if shipped.stem in PARAMETERS or stated:
        assert stated and int(stated[1].replace(",", "")) == built


def test_every_tensor_of_its_model_has_a_part_to_be_watched_in(shipped):
    model = built_from(shipped)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    groups = TensorGroups(list(shapes), list(shapes.values()))
    assert groups.numel_T.sum() == sum(parameter.numel() for parameter in model.parameters())
    if model.head_bias is not None:
        head = groups.numel_G[groups.keys.index(("", "head"))]
        assert head == model.head_bias.numel() + sum(x.numel() for x in model.transform.linear.parameters())


def test_every_line_is_commented_and_residual_and_initialisation_fit_the_claim(shipped):
    for line in shipped.read_text().splitlines():
        if line.strip() and not line.startswith("#") and not re.fullmatch(r"\w+: *(#.*)?", line):
            assert re.search(r"  ?# \S", line), f"{shipped.name}: no comment: {line}"
    if "deepnet" in shipped.stem:
        config = load_config(PretrainConfig, shipped)
        assert (config.model.residual, config.model.num_layers) == (
            "deepnorm",
            int(re.sub(r"\D", "", shipped.stem)),
        )


def _head(path):
    """The comment above the settings, as one line."""
    lines = path.read_text().split("\n\n")[0].splitlines()
    return " ".join(line.lstrip("# ") for line in lines)
