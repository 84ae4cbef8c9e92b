"""Models that predict what follows, trained for real: resumed to the bit, exported, and read by transformers."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sutrain.huggingface  # noqa: F401 - so that the library knows the exported folders
from data_prep.config_file import load_config
from sutrain.config import PretrainConfig
from sutrain.data import Samples, load_manifest
from sutrain.export import export_run
from sutrain.labelling import labelling_of
from tests.conftest import RUN
from tests.test_pretrain import final_files, records, train, write_run

GAU = {"mixer": "gau", "gau_expansion_size": 64, "gau_key_size": 16, "initialisation": "gau_alpha"}
CONTEXTS = {
    "causal": GAU | {"score_normaliser": "softmax_plus", "context": "causal"},
    "unilm": {"context": "unilm", "token_types": 2},
}
OF_HEADS = ("num_heads", "head_size", "feed_forward_size")


@pytest.fixture(scope="module", params=list(CONTEXTS))
def run(request, dataset, tmp_path_factory):
    """(context, config path, run folder) of 12 steps on two ranks."""
    model = dict(RUN["model"])
    if "mixer" in CONTEXTS[request.param]:
        model = {key: value for key, value in model.items() if key not in OF_HEADS}
    folder = tmp_path_factory.mktemp(request.param)
    config = write_run(folder, dataset, precision="fp32", model=model | CONTEXTS[request.param])
    train(config, 2)
    return request.param, config, folder / "run"


def test_the_loss_falls_and_going_on_gives_the_same_bits(run, tmp_path):
    _, config, run_dir = run
    steps, evaluations = records(run_dir), records(run_dir, "evaluation")
    assert steps[12]["loss"] < steps[1]["loss"] - 0.3
    assert evaluations[12]["validation_loss"] < evaluations[0]["validation_loss"] - 0.3
    assert evaluations[12]["validation_accuracy"] > evaluations[0]["validation_accuracy"]
    assert 0 < records(run_dir, "probe")[8]["model_update"] < 1
    copied = tmp_path / "again"
    shutil.copytree(run_dir, copied)
    shutil.rmtree(copied / "checkpoints/step-00000012")
    (copied / "checkpoints/best.json").unlink()
    assert "resumed at step 6 of 12" in train(config, 2, f"--run_dir={copied}")
    for step in range(7, 13):
        for key in ("loss", "batch_fingerprint", "tokens_total"):
            assert records(copied)[step][key] == steps[step][key]
    assert final_files(copied) == final_files(run_dir)


def test_transformers_computes_the_held_out_loss_of_the_exported_model(run, tmp_path):
    """Document by document, with the library's own shift of the labels: what training logged for packed rows."""
    _, path, run_dir = run
    config = load_config(PretrainConfig, path)
    manifest = load_manifest(config.data.dir)
    folder = export_run(run_dir, tmp_path / "model", "last")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    labelling = labelling_of(config, manifest, "validation masks")
    batch = Samples(config.data.dir, "validation", config.seed, labelling).batch(
        0, config.evaluation.sequences
    )
    loss_sum = predicted = 0
    for n, document in enumerate(batch.document_NL):
        for number in range(1, int(document.max()) + 1):
            tokens = batch.inputs_NL[n, document == number][None]
            types = None if batch.types_NL is None else batch.types_NL[n, document == number][None]
            labels = tokens if types is None else tokens.where(types == 1, -100)
            count = int((labels[:, 1:] >= 0).sum())
            if count:
                with torch.no_grad():
                    loss = model(tokens, token_type_ids=types, labels=labels).loss
                loss_sum, predicted = loss_sum + float(loss) * count, predicted + count
    logged = records(run_dir, "evaluation")[12]
    assert predicted == logged["validation_tokens"] == batch.predicted_tokens
    assert loss_sum / predicted == pytest.approx(logged["validation_loss"], abs=1e-5)
    made = model.generate(**tokenizer("ba", return_tensors="pt"), max_new_tokens=4)
    assert made.shape[1] > 1
