"""README.md of an exported folder."""

from typing import Any

from sutrain.models.configuration import EncoderConfig, parameter_count
from sutrain.models.tokenization_sutrain import OLDEST

MARK = "pretrained with sutrain"
"""Words of every card, and of no other folder's."""


def automatic_class(model_config: EncoderConfig) -> str:
    """The transformers class that loads a model with its head."""
    return "AutoModelForMaskedLM" if model_config.context == "bidirectional" else "AutoModelForCausalLM"


def model_card(model_config: EncoderConfig, card: dict[str, Any]) -> str:
    """README.md of an exported folder: what it is, how to load it, its numbers."""
    mixer = {"gau": "gated attention units", "flash": "gated attention in chunks (FLASH)"}.get(
        model_config.mixer, "multi-head attention"
    )
    masked = model_config.context == "bidirectional"
    title = "Masked language model" if masked else "Language model"
    purpose = (
        "An encoder for masked language modelling" if masked else f"A {model_config.context} language model"
    )
    use = (
        """from transformers import pipeline

fill = pipeline("fill-mask", model="path/to/this/folder", trust_remote_code=True)
print(fill("The weather is [MASK] today."))"""
        if masked
        else """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
made = model.generate(**tokenizer("The weather is", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.batch_decode(made, skip_special_tokens=True))"""
    )
    numbers = {"parameters": f"{parameter_count(model_config):,}", **card}
    rows = "\n".join(f"| {label} | {value} |" for label, value in numbers.items() if label != "name")
    settings = "\n".join(f"| {key} | {value} |" for key, value in vars(model_config).items())
    return f"""---
library_name: transformers
pipeline_tag: {"fill-mask" if masked else "text-generation"}
tags: [sutrain]
---

# {card.get("name", title)}

{purpose}: {model_config.num_layers} layers of {mixer}, hidden size
{model_config.hidden_size}, {MARK} on rows of up to {model_config.max_row_tokens} tokens.
The weights are fp32.

## Use

```python
{use}
```

`AutoTokenizer`, `AutoModel` and `{automatic_class(model_config)}` load the folder in the same way. Where sutrain is
installed, `import sutrain.huggingface` makes `trust_remote_code=True` unnecessary. The model files in this
folder are the ones it was trained with; they need torch and transformers {OLDEST} or newer, a tokenizer.model
sentencepiece too.

Several documents may share a row: give them the numbers 1, 2, ... in `attention_mask` (0 is padding) and
they do not see each other. Token types are 0 throughout, also for pairs.

## Numbers

| | |
|---|---|
{rows}

## Settings

| | |
|---|---|
{settings}
"""
