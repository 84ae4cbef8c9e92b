"""What follows is predicted: inside of a document, from what was seen, and the same however rows are batched."""

import numpy as np
import pytest
import torch

from sutrain.config import PretrainConfig
from sutrain.continuation import Continuation
from sutrain.data import Samples, load_manifest
from sutrain.labelling import labelling_of, predicted_share
from sutrain.masking import IGNORED, WordMasking
from sutrain.objectives.training_model import TrainingModel
from tests.conftest import RUN

PIECES = (1, 2, 7, 20)


def rows(count=3):
    """(tokens, documents) of rows with pieces of 1, 2, 7 and 20 tokens and two of padding; every token is another."""
    documents = np.repeat([1, 2, 3, 4, 0], [*PIECES, 2])
    tokens = np.arange(100, 100 + count * len(documents)).reshape(count, -1)
    return tokens, np.tile(documents, (count, 1))


def test_every_token_is_predicted_from_the_one_before_it_in_its_document():
    tokens, documents = rows()
    made = Continuation(0)(tokens, documents, 0)
    assert (made.inputs_NL == tokens).all() and made.types_NL is None
    for n, place in np.ndindex(*tokens.shape):
        last = place + 1 == tokens.shape[1] or documents[n, place] != documents[n, place + 1]
        expected = IGNORED if last or documents[n, place] == 0 else tokens[n, place + 1]
        assert made.labels_NL[n, place] == expected
    assert (made.hidden_NL == (made.labels_NL != IGNORED)).all()


def test_only_what_is_behind_the_prefix_is_predicted_and_both_parts_have_a_token():
    tokens, documents = rows(500)
    made = Continuation(0, prefixes=True)(tokens, documents, 0)
    assert (made.types_NL[documents == 0] == 0).all()
    ends = {length: [] for length in PIECES}
    for n, number in np.ndindex(500, len(PIECES)):
        places = np.flatnonzero(documents[n] == number + 1)
        types, labels = made.types_NL[n, places], made.labels_NL[n, places]
        prefix = int((types == 0).sum())
        assert (np.sort(types) == types).all() and (labels[: prefix - 1] == IGNORED).all()
        assert (labels[prefix - 1 : -1] == tokens[n, places][prefix:]).all() and labels[-1] == IGNORED
        ends[len(places)].append(prefix)
    assert set(ends[1]) == set(ends[2]) == {1}
    counts = np.bincount(ends[20], minlength=20)[1:]
    assert len(counts) == 19 and counts.min() > 10 and counts.max() < 50, "26 are expected at every place"


def test_prefixes_depend_on_seed_and_sample_alone():
    tokens, documents = rows(40)
    whole = Continuation(3, prefixes=True)(tokens, documents, 70)
    part = Continuation(3, prefixes=True)(tokens[25:], documents[25:], 95)
    assert (whole.types_NL[25:] == part.types_NL).all() and (whole.labels_NL[25:] == part.labels_NL).all()
    for other in (Continuation(4, prefixes=True), Continuation(3, prefixes=True, stream="validation masks")):
        assert (other(tokens, documents, 70).types_NL != whole.types_NL).any()


def config_of(context, dataset, **model):
    tree = RUN | {"run_dir": "unused", "data": {"dir": dataset}}
    return PretrainConfig.model_validate(tree | {"model": RUN["model"] | {"context": context} | model})


@pytest.mark.parametrize("context", ["bidirectional", "causal", "unilm"])
def test_the_context_decides_what_is_predicted(dataset, context):
    types = {"token_types": 2} if context == "unilm" else {}
    config = config_of(context, dataset, **types)
    manifest = load_manifest(dataset)
    labelling = labelling_of(config, manifest, "masks")
    assert isinstance(labelling, WordMasking) == (context == "bidirectional")
    samples = Samples(dataset, "train", 5, labelling)
    whole, part = samples.batch(10, 8), samples.batch(14, 4)
    assert torch.equal(whole.labels_NL[4:], part.labels_NL)
    assert (whole.types_NL is not None) == (context == "unilm")
    predicted = whole.predicted_tokens / whole.tokens
    assert predicted == pytest.approx(predicted_share(config), rel=0.35)
    short = whole.cut(8)
    assert short.inputs_NL.shape == (32, 8) and short.predicted_tokens == whole.predicted_tokens
    if context == "unilm":
        assert short.types_NL.shape == (32, 8) and torch.equal(short.types_NL.view(8, 32), whole.types_NL)
    if context == "causal":
        assert (whole.labels_NL == manifest.special_ids["[SEP]"]).any(), "where a document ends is learnt"


@pytest.mark.parametrize("context", ["causal", "unilm"])
def test_a_model_does_not_see_what_it_predicts(dataset, context):
    """Another token behind a place changes no score up to it, in any row; another one at the place does."""
    torch.manual_seed(0)
    config = config_of(context, dataset, **({"token_types": 2} if context == "unilm" else {}))
    samples = Samples(dataset, "train", 5, labelling_of(config, load_manifest(dataset), "masks"))
    batch = samples.batch(0, 4)
    model = TrainingModel(config.model).eval()
    places_M2 = torch.nonzero(batch.labels_NL != IGNORED)
    row, place = places_M2[len(places_M2) // 2].tolist()

    def scores_with_another_at(changed):
        seen = []
        given = batch.on(torch.device("cpu"))
        given["tokens_BL"] = given["tokens_BL"].clone()
        if changed is not None:
            given["tokens_BL"][row, changed] = 4
        with torch.no_grad():
            model(**given, see=seen.append)
        return torch.cat(seen)

    as_it_is = scores_with_another_at(None)
    until = (places_M2[:, 0] != row) | (places_M2[:, 1] <= place)
    there = (places_M2 == torch.tensor([row, place])).all(1)
    torch.testing.assert_close(scores_with_another_at(place + 1)[until], as_it_is[until])
    assert (scores_with_another_at(place)[there] - as_it_is[there]).abs().max() > 1e-3
