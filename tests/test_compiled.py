"""Layers compiled one by one: the same numbers, and one program whatever the depth."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from sutrain.compiled import compile_layers
from sutrain.models import attention, gates
from sutrain.models import encoder as encoder_module
from sutrain.models.masked_lm import MaskedLanguageModel
from tests.models.tiny import CONFIGS
from tests.models.varlen import varlen_in_torch

TOKENS = torch.randint(5, 300, (3, 24))


@pytest.fixture(autouse=True)
def _start_anew():
    torch._dynamo.reset()
    counters.clear()


def passes(model, documents, few=False):
    """Hidden vectors of all tokens, or of every fourth, and all gradients."""
    model.zero_grad()
    positions = torch.nonzero(documents.flatten()).squeeze(1)[:: 4 if few else 1]
    hidden = model(TOKENS, documents, positions_M=positions)
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).square().sum().backward()
    return [hidden, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("name", "again_from"),
    [
        ("roformer_v2", 1024),
        *(
            pytest.param(name, length, marks=pytest.mark.slow)
            for name, length in (("gau_alpha", 1024), ("gau_alpha", 1), ("deepnorm", 1024), ("flash", 1))
        ),
    ],
)
def test_compiled_layers_compute_the_same(name, again_from, monkeypatch):
    """In rows and document by document, each with other lengths the second time; gated units with everything kept and
    with gates projected again, and the lowest third's values."""
    monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", again_from)
    model = MaskedLanguageModel(replace(CONFIGS[name], hidden_dropout=0.0, attention_dropout=0.0)).train()
    compiled = MaskedLanguageModel(model.config).train()
    compiled.load_state_dict(model.state_dict())
    compile_layers(compiled.encoder, True, 0)
    for apart in (False, True):
        monkeypatch.setattr(encoder_module, "worthwhile", lambda *_, apart=apart: apart)
        for short in (17, 9):
            documents = torch.ones_like(TOKENS)
            documents[0, 10:], documents[1, short:] = 2, 0
            for few in (False, True):
                both = passes(model, documents, few), passes(compiled, documents, few)
                for one, other in zip(*both, strict=True):
                    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert list(compiled.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("few", [False, True])
def test_the_second_layer_takes_the_program_of_the_first(few):
    """The last one has a program of its own where it computes few tokens."""
    programs = []
    for layers in (2, 6):
        torch._dynamo.reset()
        counters.clear()
        config = replace(CONFIGS["roformer_v2"], num_layers=layers, hidden_dropout=0.0, attention_dropout=0.0)
        model = MaskedLanguageModel(config).train()
        compile_layers(model.encoder, True, 0)
        passes(model, torch.ones_like(TOKENS), few)
        programs.append(counters["stats"]["unique_graphs"])
    assert programs == [1 + few] * 2


@pytest.mark.parametrize("varlen", [False, True])
def test_batches_of_other_documents_need_no_program_of_their_own(varlen, monkeypatch):
    """By varlen attention, as on a GPU, and without. In no program are number or lengths of documents, nor how many
    tokens are predicted."""
    monkeypatch.setattr(encoder_module, "worthwhile", lambda *_: True)
    monkeypatch.setattr(
        attention, "varlen_serves", lambda query, documents, *_: varlen and not documents.masks
    )
    monkeypatch.setattr(
        attention, "varlen_attention", lambda: lambda q, k, v, at, *_: varlen_in_torch(q, k, v, at)
    )
    model = MaskedLanguageModel(replace(CONFIGS["roformer_v2"], num_layers=1)).eval()
    model.encoder.layers[0].forward = torch.compile(model.encoder.layers[0].forward, backend="eager")
    programs = []
    for size in (24, 12, 8, 6, 5, 3):  # of each document
        documents = (torch.arange(24) // size + 1).expand(3, 24).clone()
        documents[0, 24 - size // 2 :] = 0
        with torch.no_grad():
            model(TOKENS, documents, positions_M=torch.nonzero(documents.flatten()).squeeze(1)[::size])
        programs.append(counters["stats"]["unique_graphs"])
    assert programs[0] == 2  # ahead of attention and behind it
    assert programs[2:] == programs[2:3] * 4  # the first two tell it what changes


def test_unless_wanted_nothing_is_compiled():
    model = MaskedLanguageModel(CONFIGS["roformer_v2"])
    compile_layers(model.encoder, False, 3)
    passes(model.train(), torch.ones_like(TOKENS))
    assert counters["stats"]["unique_graphs"] == 0
