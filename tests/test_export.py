import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from data_prep.config_file import load_config, to_yaml
from data_prep.wordpiece import WordPieceTokenizer
from sutrain import checkpoint as checkpoints
from sutrain import export
from sutrain.checkpoint_writer import save_checkpoint
from sutrain.config import PretrainConfig
from sutrain.export import ExportError, choose_checkpoint, export_weights, main
from sutrain.huggingface import SutrainConfig, SutrainForMaskedLM
from sutrain.model_card import model_card
from sutrain.models.masked_lm import MaskedLanguageModel
from tests import warm
from tests.models.tiny import CONFIGS, VARIANTS, write_tokenizer

TEXTS = [
    "we walk in the [MASK] today",
    "今天天气很[MASK]。",
    "a longer text about language models and 音乐 and food",
]

# What a user does where sutrain is not installed, for several folders in one process.
OUTSIDE = """
import sys
import torch
from safetensors.torch import save_file
sys.modules["sutrain"] = sys.modules["data_prep"] = None  # importing them fails, even if installed
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
code = {"trust_remote_code": True}
separator = sys.argv.index("--")
folders, texts = sys.argv[1:separator], sys.argv[separator + 1:]

def automatic(folder):
    causal = AutoConfig.from_pretrained(folder, **code).context == "causal"
    return AutoModelForCausalLM if causal else AutoModelForMaskedLM

def logits(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, **code)
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return batch, automatic(folder).from_pretrained(folder, **code)(**batch).logits

with torch.no_grad():
    for number, folder in enumerate(folders):
        assert AutoConfig.from_pretrained(folder, **code).model_type == "sutrain"
        batch, first = logits(folder)
        hidden = AutoModel.from_pretrained(folder, **code)(**batch).last_hidden_state
        if automatic(folder) is AutoModelForMaskedLM:
            assert pipeline("fill-mask", model=folder, **code)(texts[0])[0]["token_str"]
        else:
            model = automatic(folder).from_pretrained(folder, **code)
            made = model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
            rest = model(made[:, :-1], logits_to_keep=1).logits[0, -1].argmax()
            assert made.shape[1] == batch["input_ids"].shape[1] + 3 and rest == made[0, -1]
        again = f"again-{number}"
        automatic(folder).from_pretrained(folder, **code).save_pretrained(again)
        AutoTokenizer.from_pretrained(folder, **code).save_pretrained(again)
        save_file({"logits": first, "hidden": hidden, "again": logits(again)[1]}, f"{number}.safetensors")
"""

# Every family: with a tied head, with a head of its own, with BERT's, and one that predicts the next token.
KINDS = ["roformer_v2", "gau_alpha", "pre", "flash", "deepnorm", "bert", "causal"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the processes that load a folder
        yield


LOADER = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
    "safetensors.torch",
)


@pytest.fixture(scope="module", autouse=True)
def _verify_in_warm_processes():
    """What an export loads its folder in is forked from a process that has the library imported, and not yet anything
    of a folder; test_folders_load_where_sutrain_is_not_installed has a process that begins with nothing."""

    def run(command, cwd, env, **_):
        assert command[:3] == [sys.executable, "-P", "-c"]
        done = warm.run(*command[2:], imported=LOADER, cwd=cwd, variables=env)
        return subprocess.CompletedProcess(command, done.returncode, "", done.stdout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "subprocess", SimpleNamespace(run=run))
        yield


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("data") / "tokenizer")


@pytest.fixture(scope="module")
def exports(tokenizer_dir, tmp_path_factory):
    """Kind of model -> (trained model, exported folder)."""
    torch.manual_seed(0)
    made = {}
    for kind in KINDS:
        model = MaskedLanguageModel(CONFIGS[kind]).eval()
        folder, cleaning = tmp_path_factory.mktemp("out") / kind, None
        if kind == "pre":  # over an earlier export, and from text that was cleaned in another way
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({"model_type": "sutrain"}))
            (folder / "README.md").write_text("A masked language model, pretrained with sutrain on rows")
            (folder / "stale.py").write_text("")
            cleaning = {"unicode": "nfkc", "strip_control": False, "min_characters": 1}
        weights, card = dict(model.state_dict()), {"optimizer updates": 12}
        export_weights(weights, CONFIGS[kind], tokenizer_dir, folder, card, cleaning)
        made[kind] = model, folder
    return made


@pytest.fixture(params=KINDS)
def exported(request, exports):
    return exports[request.param]


def logits_one_by_one(model, folder):
    """Logits of the trained model, each text alone and without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model.logits(model(tokenizer(text, return_tensors="pt")["input_ids"]))[0] for text in TEXTS]


def assert_equal_logits(found_BLV, expected):
    for row, expected_LV in enumerate(expected):
        assert (found_BLV[row, : len(expected_LV)] - expected_LV).abs().max() < 1e-5


def test_a_folder_loads_where_sutrain_is_installed(exported):
    model, folder = exported
    causal = model.config.context == "causal"
    automatic, other = (AutoModelForMaskedLM, AutoModelForCausalLM)[:: -1 if causal else 1]
    tokenizer, loaded = AutoTokenizer.from_pretrained(folder), automatic.from_pretrained(folder)
    assert other.__name__ not in json.loads((folder / "config.json").read_text())["auto_map"]
    assert type(loaded).__module__.startswith("sutrain.")  # without trust_remote_code, hence our own class
    with torch.no_grad():
        found = loaded(**tokenizer(TEXTS, padding=True, padding_side="right", return_tensors="pt")).logits
    assert_equal_logits(found, logits_one_by_one(model, folder))


def write_vocabulary(folder):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, "we", "walk", "in", "the", "to", "##day", *"今天气很。"]
    (folder / "tokenizer").mkdir()
    file = folder / "tokenizer/vocab.txt"
    file.write_text("\n".join(pieces), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["causal", "unilm"])
@pytest.mark.parametrize("wordpiece", [False, True])
def test_a_model_that_continues_a_text_is_set_up_to_do_it(tokenizer_dir, tmp_path, kind, wordpiece):
    """A prompt is not closed, stands beside what follows, and [SEP] ends the text; alone or in a batch."""
    torch.manual_seed(0)
    model = MaskedLanguageModel(replace(VARIANTS[kind], tied_head=False)).eval()
    source = write_vocabulary(tmp_path).parent if wordpiece else tokenizer_dir
    folder = export_weights(dict(model.state_dict()), model.config, source, tmp_path / "out", {})
    tokenizer, loaded = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.sep_token_id
    texts = ["we walk", "we walk in the"]
    ids = tokenizer(texts)["input_ids"]
    assert all(row[0] == tokenizer.cls_token_id and row[-1] != tokenizer.sep_token_id for row in ids)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][0].tolist() == [0] * (len(ids[1]) - len(ids[0])) + [1] * len(ids[0])
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    together = loaded.generate(**batch, **settings)[:, len(ids[1]) :]
    alone = loaded.generate(**tokenizer(texts[0], return_tensors="pt"), **settings)[:, len(ids[0]) :]
    assert torch.equal(alone[0], together[0])
    assert pipeline("text-generation", model=str(folder))(texts[0], max_new_tokens=2)[0]["generated_text"]


def test_a_model_of_a_bert_vocabulary_is_exported_with_the_librarys_tokenizer(tmp_path):
    torch.manual_seed(0)
    file = write_vocabulary(tmp_path)
    model = MaskedLanguageModel(CONFIGS["roformer_v2"]).eval()
    weights = dict(model.state_dict())
    folder = export_weights(weights, model.config, file.parent, tmp_path / "out", {}, {"unicode": "nfkc"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert "token_type_ids" not in batch
    as_prepared = WordPieceTokenizer(file.read_bytes()).ids(
        [text.encode() for text in ("We walk ｔｏday", "今天")]
    )
    assert as_prepared[0][2] == 1, "preparation itself would have cleaned the wide letters"
    assert tokenizer("We walk ｔｏday")["input_ids"] == [2, *as_prepared[0][:2], 9, 10, 3]
    assert tokenizer("今天")["input_ids"] == [2, *as_prepared[1], 3]
    loaded = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        assert_equal_logits(loaded(**batch).logits, logits_one_by_one(model, folder))
    (file.parent / "vocab.txt").rename(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match=r"no tokenizer\.model or vocab\.txt"):
        export_weights(weights, model.config, file.parent, tmp_path / "out", {})


def test_folders_load_where_sutrain_is_not_installed(exports, tmp_path):
    folders = [str(folder) for _, folder in exports.values()]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HOME")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", OUTSIDE, *folders, "--", *TEXTS]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for number, (model, folder) in enumerate(exports.values()):
        found = load_file(tmp_path / f"{number}.safetensors")
        expected = logits_one_by_one(model, folder)
        assert_equal_logits(found["logits"], expected)
        assert_equal_logits(found["again"], expected)
        assert_equal_logits(model.logits(found["hidden"]).detach(), expected)


def test_the_file_holds_fp32_weights_under_the_trained_names(exported):
    model, folder = exported
    stored = load_file(folder / "model.safetensors")
    trained = model.state_dict()
    assert stored.keys() == {f"model.{name}" for name in trained}
    for name, tensor in trained.items():
        assert stored[f"model.{name}"].dtype == torch.float32
        assert torch.equal(stored[f"model.{name}"], tensor)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "causal"])
def test_fill_mask_proposes_tokens(exports, kind):
    _, folder = exports[kind]
    fill = pipeline("fill-mask", model=str(folder))
    proposals = fill("今天天气很[MASK]。", top_k=3)
    assert len(proposals) == 3
    assert proposals[0]["score"] >= proposals[1]["score"] > 0


def test_the_card_tells_how_to_load_it_and_its_numbers(exported):
    _, folder = exported
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "| optimizer updates | 12 |" in card
    assert "| parameters |" in card


def write_run(folder, dataset, config_file):
    """A run folder with two checkpoints, of which the first is marked best; returns the two models."""
    config = load_config(PretrainConfig, config_file, [f"--data.dir={dataset}", f"--run_dir={folder}"])
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = [{"kind": "step", "step": 6}, {"kind": "evaluation", "step": 6, "validation_loss": 1.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = []
    for updates in (6, 12):
        model = MaskedLanguageModel(config.model).eval()
        state = model.state_dict()
        slices = [("master", name, 0, tensor.flatten()) for name, tensor in state.items()]
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        counters = {
            "steps": updates,
            "skipped": 0,
            "optimizer": {"updates": updates - 2},  # two were refused
            "samples_consumed": 72,
            "tokens": 2304,
            "corpora": [{"content_hash": "abc"}],
        }
        save_checkpoint(folder / "checkpoints", updates, slices, {}, shapes, counters)
        models.append(model)
    checkpoints.mark_best(folder / "checkpoints", 6, 1.25, "40 rows")
    return models


def test_a_run_is_exported_from_its_best_checkpoint_or_another(tmp_path, dataset, write_config, capsys):
    run = tmp_path / "run"
    best, last = write_run(run, dataset, write_config())
    for choice, model in (("best", best), (str(run / "checkpoints/step-00000012"), last)):
        main(["--run", str(run), "--output", str(tmp_path / "out"), "--checkpoint", choice])
        stored = load_file(tmp_path / "out/model.safetensors")
        for name, tensor in model.state_dict().items():
            assert torch.equal(stored[f"model.{name}"], tensor)
        card = (tmp_path / "out/README.md").read_text()
        assert ("| held-out loss, nats per predicted token | 1.2500 |" in card) == (model is best)
        assert "| sequences seen | 72 |" in card
        assert f"| optimizer updates | {4 if model is best else 10} |" in card
    assert "loads and computes" in capsys.readouterr().out
    assert choose_checkpoint(run, "last").name == "step-00000012"


def test_a_wrong_run_folder_gets_one_line(tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--run", str(tmp_path), "--output", str(tmp_path / "out")])
    assert stop.value.code == f"error: {tmp_path}: no config.yaml; expected the folder of a run"


def weights_of(name="roformer_v2"):
    return dict(MaskedLanguageModel(CONFIGS[name]).state_dict())


def test_all_weights_that_do_not_fit_are_named_at_once(tokenizer_dir, tmp_path):
    weights = weights_of()
    weights["extra.weight"] = torch.zeros(1)
    del weights["encoder.layers.0.mixer.key.weight"]
    weights["encoder.layers.1.mixer.key.weight"] = torch.zeros(2, 2)
    weights["encoder.layers.2.mixer.key.weight"][0, 0] = float("nan")
    with pytest.raises(ExportError) as error:
        export_weights(weights, CONFIGS["roformer_v2"], tokenizer_dir, tmp_path / "out", {})
    text = str(error.value)
    for expected in (
        "layers.0.mixer.key.weight: missing",
        "extra.weight: not part",
        "[2, 2], expected",
        "finite",
    ):
        assert expected in text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tokenizer_dir, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ExportError, match="not an earlier export"):
        export_weights(weights_of(), CONFIGS["roformer_v2"], tokenizer_dir, tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_what_was_trained_on_from_an_export_is_left_alone(tokenizer_dir, tmp_path):
    """A folder of save_pretrained has no card, and what a trainer leaves in an export is named."""
    SutrainForMaskedLM(SutrainConfig(**vars(CONFIGS["roformer_v2"]))).save_pretrained(tmp_path)
    arguments = weights_of(), CONFIGS["roformer_v2"], tokenizer_dir, tmp_path, {}
    with pytest.raises(ExportError, match="not an earlier export"):
        export_weights(*arguments)
    (tmp_path / "README.md").write_text(model_card(CONFIGS["roformer_v2"], {}))
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "training_args.bin").write_text("")
    with pytest.raises(ExportError, match=r"found checkpoint-500, training_args\.bin in an earlier export"):
        export_weights(*arguments)
    assert (tmp_path / "checkpoint-500").is_dir()


def test_an_earlier_export_is_replaced_and_nothing_else_is_left(exports):
    _, folder = exports["pre"]
    assert not (folder / "stale.py").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["pre"]


def test_the_tokenizer_cleans_text_as_it_was_cleaned_for_training(exports):
    settings = json.loads((exports["pre"][1] / "tokenizer_config.json").read_text())
    assert {key: settings[key] for key in ("unicode", "strip_control")} == {
        "unicode": "nfkc",
        "strip_control": False,
    }


def test_a_model_that_computes_something_else_is_not_handed_over(tokenizer_dir, tmp_path, monkeypatch):
    """The comparison must notice a right-shaped weight in the wrong place."""
    write = export._write_folder

    def swapped(folder, weights, *rest):
        query, key = (f"encoder.layers.1.mixer.{part}.weight" for part in ("query", "value"))
        write(folder, weights | {query: weights[key], key: weights[query]}, *rest)

    monkeypatch.setattr(export, "_write_folder", swapped)
    with pytest.raises(ExportError, match="computes other logits"):
        export_weights(weights_of(), CONFIGS["roformer_v2"], tokenizer_dir, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    bigger = write_tokenizer(tmp_path / "bigger", vocab_size=320)
    with pytest.raises(ExportError, match="320 pieces for a model of 300 tokens"):
        export_weights(weights_of(), CONFIGS["roformer_v2"], bigger, tmp_path / "out", {})
    with pytest.raises(ExportError, match=r"no tokenizer\.model"):
        export_weights(weights_of(), CONFIGS["roformer_v2"], tmp_path / "nowhere", tmp_path / "out", {})
