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
    """Another token behind a place changes nothing that is predicted from there; one before it does."""
    torch.manual_seed(0)
    config = config_of(context, dataset, **({"token_types": 2} if context == "unilm" else {}))
    samples = Samples(dataset, "train", 5, labelling_of(config, load_manifest(dataset), "masks"))
    batch = samples.batch(0, 4)
    model = TrainingModel(config.model).eval()

    def loss_until(place, changed):
        """Summed losses of what is predicted up to a place, with the token at `changed` another one."""
        given = batch.on(torch.device("cpu"))
        given["tokens_BL"] = given["tokens_BL"].clone()
        given["tokens_BL"][:, changed] = 4
        given["labels_BL"] = given["labels_BL"].clone()
        given["labels_BL"][:, place + 1 :] = IGNORED
        return float(model(**given).loss_sum.detach())

    behind = batch.types_NL[:, 21] if batch.types_NL is not None else torch.ones(4)
    assert (behind == 1).any()
    if context == "causal":
        assert loss_until(20, 21) == pytest.approx(loss_until(20, 25), rel=1e-6)
    else:  # a token behind a prefix changes nothing of what is predicted before it
        rows_NL = torch.nonzero(batch.labels_NL != IGNORED)
        n, place = (int(x) for x in rows_NL[len(rows_NL) // 2])
        given = batch.on(torch.device("cpu"))
        before = model(**given, see=(kept := []).append) and kept[0]
        given["tokens_BL"] = given["tokens_BL"].clone()
        given["tokens_BL"][n, place + 1] = 4
        after = model(**given, see=(again := []).append) and again[0]
        same = (rows_NL[:, 0] != n) | (rows_NL[:, 1] <= place)
        torch.testing.assert_close(after[same], before[same])
    assert loss_until(20, 19) != pytest.approx(loss_until(20, 25), rel=1e-6)
