"""Held-out numbers: those of the scores themselves, however many are held at a time."""

import pytest
import torch
from torch.nn import functional as F

from sutrain.config import PretrainConfig
from sutrain.data import load_manifest
from sutrain.evaluation import Evaluator
from sutrain.objectives import masked_lm
from sutrain.objectives.training_model import TrainingModel
from tests.conftest import RUN


@pytest.mark.parametrize("context", ["bidirectional", "causal"])
def test_scores_in_pieces_give_the_numbers_of_all_scores(dataset, context, monkeypatch):
    torch.manual_seed(0)
    model = RUN["model"] | {"context": context}
    tree = RUN | {"run_dir": "unused", "data": {"dir": dataset}, "model": model}
    config = PretrainConfig.model_validate(tree)
    evaluator = Evaluator(config, load_manifest(dataset), torch.device("cpu"), 0, 1)
    trained = TrainingModel(config.model).eval()
    whole = evaluator(trained, 3)
    monkeypatch.setattr(masked_lm, "CHUNK_POSITIONS", 16)
    in_pieces = evaluator(trained, 3)
    assert in_pieces == {
        key: pytest.approx(value, rel=1e-5) if key != "step" else 3 for key, value in whole.items()
    }

    batch = evaluator.samples.batch(0, evaluator.sequences)
    with torch.no_grad():
        scores_NLV = trained.logits(trained(batch.inputs_NL, batch.document_NL))
    chosen = batch.labels_NL >= 0
    loss = F.cross_entropy(scores_NLV[chosen], batch.labels_NL[chosen])
    right = (scores_NLV.argmax(-1) == batch.labels_NL)[batch.hidden_NL]
    assert whole["validation_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert whole["validation_accuracy"] == pytest.approx(float(right.double().mean()), rel=1e-6)
    assert whole["validation_loss_by_source"]["made"] == pytest.approx(float(loss), rel=1e-5)
    assert whole["validation_tokens"] == int(batch.hidden_NL.sum())
