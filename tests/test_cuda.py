"""What only a GPU can show: pytest tests/test_cuda.py on a machine with one; elsewhere all of it is skipped.

Varlen attention, no waiting for the device inside of layers, runs that follow the CPU's, resumed runs that are bit for
bit the uninterrupted (under `determinism`), and exported folders in 16 bits.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import sutrain.huggingface
from sutrain.batch_plan import BatchPlan
from sutrain.compare import compare_checkpoints, compare_steps, read_steps
from sutrain.export import export_weights
from sutrain.models import gates
from sutrain.models.attention import varlen_exists
from sutrain.models.documents import find_documents
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.models.visibility import build_visibility_of_documents
from sutrain.prefetch import prefetch
from tests.conftest import RUN
from tests.models.tiny import CONFIGS, write_tokenizer
from tests.test_prefetch import open_samples
from tests.test_pretrain import launch, train, write_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICE = "cuda"
ON_GPU = {"DS_ACCELERATOR": "cuda"}
HALVES = [torch.bfloat16, torch.float16]
UNDROPPED = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def model_and_batch(dtype, **changes):
    """A model of heads of 16 features on the device, and rows of documents and padding."""
    torch.manual_seed(0)
    sizes = {"num_heads": 2, "head_size": 16, **UNDROPPED}
    model = MaskedLanguageModel(replace(CONFIGS["roformer_v2"], **sizes, **changes)).to(DEVICE, dtype)
    tokens_BL = torch.randint(5, 300, (4, 64), device=DEVICE)
    lengths = torch.tensor([[20, 44, 0], [1, 2, 30], [64, 0, 0], [7, 9, 11]])
    document_BL = torch.zeros(4, 64, dtype=torch.long)
    for row, sizes_of_row in enumerate(lengths.tolist()):
        numbers = [number for number, size in enumerate(sizes_of_row, 1) for _ in range(size)]
        document_BL[row, : len(numbers)] = torch.tensor(numbers)
    return model, tokens_BL, document_BL.to(DEVICE)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("normaliser", ["softmax", "softmax_plus"])
def test_documents_apart_are_what_they_are_under_a_mask(dtype, normaliser):
    """Outputs and gradients of varlen attention against the mask's, and both against the CPU in fp32."""
    model, tokens_BL, document_BL = model_and_batch(dtype, score_normaliser=normaliser)
    assert varlen_exists(tokens_BL.device, dtype, 16, 16)
    real_BL = document_BL > 0
    found = {}
    for apart in (True, False):
        model.encoder.take_rows_apart = apart
        model.zero_grad()
        outputs = model(tokens_BL, document_BL)[real_BL].float()
        outputs.square().mean().backward()
        gradient = torch.cat([p.grad.flatten().float() for p in model.encoder.layers.parameters()])
        found[apart] = outputs.detach().cpu(), gradient.cpu()
    exact = model.float().cpu()(tokens_BL.cpu(), document_BL.cpu())[real_BL.cpu()].detach()
    for apart in (True, False):
        assert (found[apart][0] - exact).abs().max() < 0.1, apart  # block outputs have an RMS of 1
    outputs, gradients = zip(found[True], found[False], strict=True)
    assert (outputs[0] - outputs[1]).square().mean().sqrt() < 0.02
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gated_units_that_project_again_have_the_gradients_of_those_that_keep(dropout, monkeypatch):
    config = replace(CONFIGS["gau_alpha"], hidden_dropout=0.0, attention_dropout=dropout)
    torch.manual_seed(0)
    model = MaskedLanguageModel(config).to(DEVICE, torch.bfloat16).train()
    tokens_BL = torch.randint(5, 300, (4, 24), device=DEVICE)
    found = []
    for length in (25, 1):  # from which value and gate are projected again
        monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", length)
        torch.manual_seed(1)  # the same dropout
        model.zero_grad()
        outputs = model(tokens_BL).float()
        (outputs * torch.linspace(-1, 1, outputs.shape[-1], device=DEVICE)).sum().backward()
        gradient = torch.cat([p.grad.flatten().float() for p in model.encoder.layers.parameters()])
        found.append((outputs.detach(), gradient))
    assert (found[0][0] - found[1][0]).square().mean().sqrt() < 0.02
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99


def test_no_layer_waits_for_the_device():
    model, _, document_BL = model_and_batch(torch.bfloat16)
    documents = find_documents(document_BL)
    visible = build_visibility_of_documents(documents, model.config, torch.bfloat16, None)
    x_BLD = torch.randn(
        1, documents.index_T.numel(), 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True
    )
    model.encoder.layers[0](x_BLD, visible).sum().backward()  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in model.encoder.layers:
            x_BLD = layer(x_BLD, visible)
        x_BLD.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_was_read_ahead_arrives_on_the_device(dataset):
    for (batch,) in prefetch(open_samples(dataset), BatchPlan(4, 4, 1, 0), 0, 40):
        there, here = batch.on(torch.device("cuda")), batch.on(torch.device("cpu"))
        assert all(there[name].is_cuda and there[name].cpu().equal(values)
                   for name, values in here.items() if values is not None)  # fmt: skip


def test_a_run_in_fp32_follows_that_of_the_cpu(dataset, tmp_path):
    """From the same weights: first ones are drawn on the device that trains, and a GPU draws other numbers."""
    config = write_run(tmp_path, dataset, precision="fp32", model={**RUN["model"], **UNDROPPED})
    begun = f"--init_from={tmp_path / 'first'}"
    train(config, 1, f"--run_dir={tmp_path / 'first'}", "--steps=1")
    train(config, 1, begun)
    train(config, 1, begun, f"--run_dir={tmp_path / 'gpu'}", variables=ON_GPU)
    assert compare_steps(read_steps(tmp_path / "run"), read_steps(tmp_path / "gpu"), 1e-3) == []


ENGINES = {
    "0 fp16": (0, {"precision": "fp16", "gradient_precision": "fp16"}),
    "1": (1, {"precision": "bf16"}),
    "2": (2, {"precision": "bf16"}),
    "3": (3, {"precision": "bf16"}),
    "1 compiled": (1, {"precision": "bf16", "compile_layers": True}),
}


@pytest.mark.parametrize(("stage", "changes"), ENGINES.values(), ids=ENGINES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(dataset, tmp_path, stage, changes):
    """In 16 bits, with dropout, under `determinism`."""
    config = write_run(tmp_path, dataset, determinism=True, zero={"stage": stage}, **changes)
    train(config, 1, variables=ON_GPU)
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-00000012")
    (tmp_path / "resumed/checkpoints/best.json").unlink(missing_ok=True)
    train(config, 1, f"--run_dir={tmp_path / 'resumed'}", variables=ON_GPU)
    steps = [read_steps(tmp_path / name) for name in ("run", "resumed")]
    assert compare_steps(*steps, 0) == []
    assert compare_checkpoints(tmp_path / "run", tmp_path / "resumed") == []


def test_more_ranks_than_devices_are_refused_in_one_line(dataset, tmp_path):
    ranks = torch.cuda.device_count() + 1
    process = launch(write_run(tmp_path, dataset), ranks, variables=ON_GPU)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and f"{ranks} ranks on this host but" in output, output


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["roformer_v2", "gau_alpha", "flash", "causal"])
def test_an_exported_folder_in_16_bits_gives_the_logits_of_the_trained_model(kind, dtype, tmp_path):
    torch.manual_seed(0)
    model = MaskedLanguageModel(CONFIGS[kind]).eval()
    tokenizer_dir = write_tokenizer(tmp_path / "tokenizer")
    folder = export_weights(dict(model.state_dict()), model.config, tokenizer_dir, tmp_path / "out", {})
    automatic = AutoModelForMaskedLM if kind != "causal" else sutrain.huggingface.SutrainForCausalLM
    loaded = automatic.from_pretrained(folder, dtype=dtype).to(DEVICE)
    texts = ["we walk in the park today", "今天天气很好,我们去公园散步。"]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.logits(model(batch["input_ids"], batch["attention_mask"]))
        found = loaded(**batch.to(DEVICE)).logits.float().cpu()
    real_BL = batch["attention_mask"].cpu() > 0
    scale = expected[real_BL].square().mean().sqrt()
    assert (found - expected)[real_BL].square().mean().sqrt() < 0.03 * scale
