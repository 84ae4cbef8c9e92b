"""Turn a trained run into a folder that Hugging Face transformers loads, also where sutrain is not installed.

    python -m sutrain.export --run RUN_DIR --output DIR [--checkpoint best|last|PATH]

The folder holds the fp32 weights, configuration, tokenizer, the very files that define the model, and a model
card. It appears under its name only after a fresh process has loaded it and computed the same logits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import normalizers, processors
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from data_prep.config_file import load_config
from data_prep.shards import Manifest
from data_prep.wordpiece import WordPieceTokenizer
from sutrain import checkpoint as checkpoints
from sutrain.config import PretrainConfig
from sutrain.huggingface import (
    AUTO_MAP,
    SutrainConfig,
    SutrainForCausalLM,
    SutrainForMaskedLM,
    SutrainTokenizer,
)
from sutrain.model_card import MARK, automatic_class, model_card
from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.monitor.log import DamagedLogError, read_run

AnyTokenizer = SutrainTokenizer | PreTrainedTokenizerFast

TOLERANCE = 1e-4
"""Largest difference of a logit between trained model and loaded folder, relative to the largest logit."""

# Several lengths and scripts, so that padding, unknown characters and the mask token are all exercised.
PROBE_TEXTS = (
    "The weather is [MASK] today.",
    "今天天气很[MASK],我们去公园散步。",
    "One 两 three: a longer line with digits 1234567890, mixed scripts 中文 and marks; it pads the others!",
    "",
)

# Run by a fresh interpreter outside the repository, exactly as a user of the folder would load it.
_LOAD_AND_RUN = """
import sys
import torch
from safetensors.torch import save_file
import transformers
folder, output, automatic, *texts = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model, info = getattr(transformers, automatic).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
problems = {key: sorted(map(str, found)) for key, found in info.items() if found}
if problems:
    sys.exit(f"weights do not fit: {problems}")
batch = tokenizer(texts, padding=True, padding_side="right", truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = model.eval()(**batch).logits
save_file({"input_ids": batch["input_ids"], "logits": logits.float().contiguous()}, output)
"""


class ExportError(ValueError):
    """The export cannot be made or does not compute what was trained; the message says why."""


def export_weights(
    weights: dict[str, Tensor],
    model_config: EncoderConfig,
    tokenizer_dir: Path,
    output_dir: Path,
    card: dict[str, Any],
    cleaning: dict[str, Any] | None = None,
) -> Path:
    """Write `output_dir` and return it; nothing is left behind on failure.

    Args:
        weights: fp32 tensors under the names of `MaskedLanguageModel`.
        tokenizer_dir: folder with tokenizer.model or a BERT vocab.txt.
        card: facts for the model card, in order: label -> value; "name" becomes its title.
        cleaning: how the training text was cleaned: unicode, strip_control, collapse_whitespace.

    Raises:
        ExportError: when `output_dir` holds something else, when weights or tokenizer do not fit the model,
            or when the loaded folder computes other logits.
    """
    output_dir = Path(output_dir)
    _check_replaceable(output_dir)
    model = _trained_model(weights, model_config)
    tokenizer = _tokenizer(Path(tokenizer_dir), model_config, cleaning or {})

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as scratch:
        folder = Path(scratch) / "export"
        _write_folder(folder, weights, model_config, tokenizer, card)
        _verify(folder, model, tokenizer)
        if output_dir.exists():
            output_dir.rename(Path(scratch) / "replaced")
        folder.rename(output_dir)
    return output_dir


def _check_replaceable(output_dir: Path) -> None:
    """Raises ExportError for a folder with anything in it that replacing an earlier export would lose."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    try:
        earlier = json.loads((output_dir / "config.json").read_text())[
            "model_type"
        ] == SutrainConfig.model_type and MARK in (output_dir / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError):
        earlier = False
    if not earlier:
        raise ExportError(f"{output_dir}: exists and is not an earlier export; give an empty or a new folder")
    more = sorted(p.name for p in output_dir.iterdir() if not any(fnmatch(p.name, own) for own in _WRITTEN))
    if more:
        raise ExportError(
            f"{output_dir}: found {', '.join(more[:3])}{' and more' if len(more) > 3 else ''} in an earlier export, "
            "which writing it anew would lose; move that away, or give a new folder"
        )


_WRITTEN = ("*.py", "*.json", "*.safetensors", "tokenizer.model", "README.md", "__pycache__")
"""What an export consists of."""


def _trained_model(weights: dict[str, Tensor], model_config: EncoderConfig) -> MaskedLanguageModel:
    """The model as it was trained, in evaluation mode. Raises ExportError naming all that does not fit."""
    with torch.device("meta"):
        model = MaskedLanguageModel(model_config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems = [f"{name}: missing" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{name}: not part of this model" for name in sorted(weights.keys() - expected.keys())]
    for name in sorted(expected.keys() & weights.keys()):
        if weights[name].shape != expected[name]:
            problems.append(
                f"{name}: found shape {list(weights[name].shape)}, expected {list(expected[name])}"
            )
        elif not torch.isfinite(weights[name]).all():
            problems.append(f"{name}: holds values that are not finite")
    if problems:
        raise ExportError("weights: " + "\nweights: ".join(problems))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model.eval()


def _tokenizer(folder: Path, model_config: EncoderConfig, cleaning: dict[str, Any]) -> AnyTokenizer:
    """The tokenizer in `folder` as transformers has it: our class around a sentencepiece model, or the library's own
    for a BERT vocab.txt."""
    known = ("unicode", "strip_control", "collapse_whitespace")
    settings = {key: cleaning[key] for key in known if key in cleaning}
    length = model_config.max_row_tokens
    file, vocabulary = folder / "tokenizer.model", folder / "vocab.txt"
    # A prompt does not end with the end of its text, and stands next to what is generated.
    continued = model_config.context != "bidirectional"
    if file.is_file():
        settings |= {"continued": True, "padding_side": "left"} if continued else {}
        tokenizer: AnyTokenizer = SutrainTokenizer(str(file), model_max_length=length, **settings)
    elif vocabulary.is_file():
        tokenizer = _wordpiece(vocabulary, length, settings.get("unicode", "nfc"), continued)
    else:
        raise ExportError(
            f"{folder}: no tokenizer.model or vocab.txt; expected the tokenizer that the data was prepared with"
        )
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ExportError(
            f"{folder}: found {tokenizer.vocab_size} pieces for a model of {model_config.vocab_size} tokens; "
            "expected the tokenizer that the data was prepared with"
        )
    return tokenizer


def _wordpiece(vocabulary: Path, length: int, unicode: str, continued: bool) -> PreTrainedTokenizerFast:
    """WordPiece as preparation had it; token types are left to the model, which saw zeros only."""
    backend = WordPieceTokenizer(vocabulary.read_bytes(), str(vocabulary)).backend
    if unicode != "none":
        form = normalizers.NFKC() if unicode == "nfkc" else normalizers.NFC()
        backend.normalizer = normalizers.Sequence([form, backend.normalizer])
    ends: dict[str, Any] = {}
    if continued:
        start = ("[CLS]", backend.token_to_id("[CLS]"))
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[start]
        )
        ends = {"bos_token": "[CLS]", "eos_token": "[SEP]", "padding_side": "left"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        **ends,
    )


def _write_folder(
    folder: Path,
    weights: dict[str, Tensor],
    model_config: EncoderConfig,
    tokenizer: AnyTokenizer,
    card: dict[str, Any],
) -> None:
    with torch.device("meta"):
        kind = SutrainForMaskedLM if model_config.context == "bidirectional" else SutrainForCausalLM
        exported = kind(SutrainConfig(**vars(model_config)))
    state = {f"model.{name}": tensor.float() for name, tensor in weights.items()}
    exported.load_state_dict(state, assign=True)
    other = "AutoModelForCausalLM" if kind is SutrainForMaskedLM else "AutoModelForMaskedLM"
    if kind is SutrainForCausalLM:  # a text ends with the token that ended it in training
        exported.generation_config = GenerationConfig(
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    exported.config.auto_map = {name: place for name, place in AUTO_MAP.items() if name != other}
    exported.save_pretrained(folder)  # also writes the files that define the model
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(model_config, card), encoding="utf-8")


def _verify(folder: Path, model: MaskedLanguageModel, tokenizer: AnyTokenizer) -> None:
    """Load the folder in a fresh process and compare its logits with the trained model's, text by text."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "logits.safetensors"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # -P: the current folder is no place to import from, so that only installed packages are found.
        command = [
            sys.executable,
            "-P",
            "-c",
            _LOAD_AND_RUN,
            str(folder.resolve()),
            str(output),
            automatic_class(model.config),
            *PROBE_TEXTS,
        ]
        finished = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if finished.returncode != 0:
            raise ExportError(f"the exported folder does not load:\n{finished.stderr.strip()}")
        found = load_file(output)
    for row, text in enumerate(PROBE_TEXTS):
        ids = tokenizer(text, truncation=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected_LV = model.logits(model(ids))[0]
        length = expected_LV.shape[0]
        if not torch.equal(found["input_ids"][row, :length], ids[0]):
            raise ExportError(f"the exported tokenizer gives other ids for {text!r}")
        difference = float((found["logits"][row, :length] - expected_LV).abs().max())
        limit = TOLERANCE * max(1.0, float(expected_LV.abs().max()))
        if not difference <= limit:
            raise ExportError(
                f"the exported model computes other logits for {text!r}: "
                f"difference {difference:.2e}, limit {limit:.1e}"
            )


def choose_checkpoint(run_dir: Path, choice: str) -> Path:
    """Folder of the checkpoint called best, last, or at a path. Raises ExportError when there is none."""
    directory = run_dir / "checkpoints"
    if choice not in ("best", "last"):
        return Path(choice)
    if choice == "best":
        marked = checkpoints.best(directory)
        if marked is not None:
            return directory / checkpoints.step_name(marked["step"])
        print("no checkpoint is marked best; exporting the last one", file=sys.stderr)
    newest, damaged = checkpoints.find_latest(directory)
    for line in damaged:
        print(f"warning: damaged checkpoint passed over: {line}", file=sys.stderr)
    if newest is None:
        raise ExportError(
            f"{directory}: no intact checkpoint; expected the folder of a run that has saved one"
        )
    return newest.folder


def export_run(run_dir: Path, output_dir: Path, choice: str = "best") -> Path:
    """Export one checkpoint of a run; see `export_weights`. `choice`: best, last or a checkpoint's folder."""
    if not (run_dir / "config.yaml").is_file():
        raise ExportError(f"{run_dir}: no config.yaml; expected the folder of a run")
    config = load_config(PretrainConfig, run_dir / "config.yaml", [])
    manifest = Manifest.load(config.data.dir)
    folder = choose_checkpoint(run_dir, choice)
    checkpoint = checkpoints.Checkpoint(folder)
    if checkpoint.counters["steps"] < config.model.ramp_steps:
        raise ExportError(
            f"{folder}: found step {checkpoint.counters['steps']} of a residual ramp of {config.model.ramp_steps}; "
            "its branches do not count in full yet, as they will in the exported model: train on, or choose a later one"
        )
    card = {
        "name": run_dir.resolve().name,
        "optimizer updates": f"{checkpoint.counters['optimizer']['updates']:,}",
        "sequences seen": f"{checkpoint.counters['samples_consumed']:,}",
        "tokens seen": f"{checkpoint.counters['tokens']:,}",
        **_validation_numbers(run_dir, checkpoint.counters["steps"]),
        "data": ", ".join(corpus["content_hash"] for corpus in checkpoint.counters["corpora"]),
    }
    return export_weights(
        checkpoints.load_full_weights(folder),
        config.model,
        Path(config.data.dir) / "tokenizer",
        output_dir,
        card,
        manifest.config.get("cleaning"),
    )


def _validation_numbers(run_dir: Path, step: int) -> dict[str, str]:
    """The held-out numbers that the run logged at this step; empty if it evaluated at others only."""
    labels = {
        "validation_loss": "held-out loss, nats per predicted token",
        "validation_accuracy": "held-out accuracy, of tokens that are not shown",
        "unigram_accuracy": "accuracy of always guessing the most frequent token",
    }
    try:
        log = read_run(run_dir, kinds=("evaluation",))
    except DamagedLogError as error:
        print(f"the card goes without held-out numbers: {error}", file=sys.stderr)
        return {}
    numbers = {}
    for key, label in labels.items():
        by_step = dict(zip(*log.series(key, "evaluations"), strict=True))
        if step in by_step:
            numbers[label] = f"{by_step[step]:.4f}"
    return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry; a user's mistake is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m sutrain.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; a new one or an earlier export"
    )
    parser.add_argument(
        "--checkpoint", default="best", help="best, last, or a checkpoint's folder (default: best)"
    )
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        output = export_run(options.run, options.output, options.checkpoint)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{output}: loads and computes the trained model's logits")


if __name__ == "__main__":
    main()
