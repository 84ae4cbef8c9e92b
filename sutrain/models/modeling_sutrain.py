"""The encoder behind the Hugging Face interface; the model itself is defined in encoder.py and masked_lm.py.

B batch, L sequence length, D hidden size, V vocabulary. In a file of `SutrainForMaskedLM` or `SutrainForCausalLM` a
weight has the name it was trained under, after the prefix `model.`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, MaskedLMOutput

from .configuration_sutrain import SutrainConfig
from .encoder import Encoder
from .init import initialise
from .masked_lm import MaskedLanguageModel


class SutrainPreTrainedModel(PreTrainedModel):
    """What both models share: configuration, initial weights, loading and saving."""

    config_class = SutrainConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding) and not hasattr(module, "role"):
            super()._init_weights(module)  # a layer that somebody added to the model
        elif isinstance(module, nn.Linear) and getattr(module.weight, "_is_hf_initialized", False):
            if module.bias is not None:  # the weight was in the file; initialise() would draw its parts anew
                nn.init.zeros_(module.bias)
        else:
            initialise(module, self.config.encoder_config())


def _encode(
    encoder: Encoder,
    config: PreTrainedConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    output_hidden_states: bool | None,
    output_attentions: bool | None,
) -> BaseModelOutput:
    if config.output_attentions if output_attentions is None else output_attentions:
        raise ValueError(
            "output_attentions: found True; attention is computed by kernels that do not hand it out: leave it out"
        )
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids: found shape {list(input_ids.shape)}, expected [rows, tokens] with at least one token a row"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: found shape {list(attention_mask.shape)}, expected that of input_ids "
            f"{list(input_ids.shape)}: 0 for padding, and 1 (or the number of its document) for every token"
        )
    document_BL = None if attention_mask is None else attention_mask.long()
    wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    collected: list[Tensor] | None = [] if wanted else None
    hidden_BLD = encoder(input_ids, document_BL, token_type_ids, collected)
    return BaseModelOutput(
        last_hidden_state=hidden_BLD, hidden_states=None if collected is None else tuple(collected)
    )


class SutrainModel(SutrainPreTrainedModel):
    """The encoder alone: token ids to hidden vectors."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?(head|head_bias|transform)(\.|$)"]  # noqa: RUF012

    def __init__(self, config: SutrainConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config.encoder_config())
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.encoder.embeddings.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.encoder.embeddings.token = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """Hidden vectors of every token.

        Args:
            input_ids: token ids [B, L].
            attention_mask: [B, L], 0 for padding and 1 for tokens; several documents packed in a row get the
                numbers 1, 2, ... and do not see each other. None means every id that is not the padding id.
            token_type_ids: [B, L]; the models are pretrained with 0 everywhere, which None means too. In context
                unilm 1 marks what follows a document's prefix.
            output_hidden_states: also return the embeddings' and each layer's output.
            output_attentions: refused with a ValueError if true.
        """
        output = _encode(
            self.encoder,
            self.config,
            input_ids,
            attention_mask,
            token_type_ids,
            output_hidden_states,
            output_attentions,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


class SutrainWithHead(SutrainPreTrainedModel):
    """What the models that predict tokens share."""

    def __init__(self, config: SutrainConfig) -> None:
        super().__init__(config)
        self.model = MaskedLanguageModel(config.encoder_config())
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding; a tied head is this very tensor, so there is nothing to keep in step."""
        return self.model.encoder.embeddings.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding, and with it a tied head."""
        self.model.encoder.embeddings.token = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head's own matrix, or None if it is tied."""
        return self.model.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head's own matrix."""
        self.model.head = value

    def resize_token_embeddings(self, *arguments: Any, **keywords: Any) -> nn.Embedding:
        """Change the vocabulary; a bias of the head follows, 0 for new tokens."""
        embedding = super().resize_token_embeddings(*arguments, **keywords)
        bias = self.model.head_bias
        if bias is not None and len(bias) != embedding.num_embeddings:
            grown = bias.new_zeros(embedding.num_embeddings)
            kept = min(len(bias), len(grown))
            grown[:kept] = bias.detach()[:kept]
            self.model.head_bias = nn.Parameter(grown)
        return embedding


class SutrainForMaskedLM(SutrainWithHead):
    """The encoder with its head, which predicts the masked tokens."""

    def __init__(self, config: SutrainConfig) -> None:
        if (context := config.encoder_config().context) != "bidirectional":
            raise ValueError(
                f"context: found {context}; a model that predicts the next token is loaded with AutoModelForCausalLM"
            )
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Scores of the vocabulary at every position, [B, L, V], and with `labels` the loss.

        Args:
            input_ids, attention_mask, token_type_ids, output_hidden_states: see `SutrainModel.forward`.
            labels: [B, L], the token to predict, or -100 where nothing is predicted; the loss is the mean
                over the others.
        """
        encoded = _encode(
            self.model.encoder,
            self.config,
            input_ids,
            attention_mask,
            token_type_ids,
            output_hidden_states,
            output_attentions,
        )
        logits_BLV = self.model.logits(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            expected_N = labels.flatten().to(logits_BLV.device)
            loss = F.cross_entropy(logits_BLV.flatten(0, 1).to(torch.float32), expected_N)
        output = MaskedLMOutput(loss=loss, logits=logits_BLV, hidden_states=encoded.hidden_states)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


class SutrainForCausalLM(SutrainWithHead, GenerationMixin):
    """A causal model with its head, which predicts the next token. Generation computes the whole text every step; in
    context unilm the prompt is the prefix, which is seen from both sides, and what is generated follows it."""

    _is_stateful = True  # in the sense that nothing can be taken back from a cache: no assisted generation

    def __init__(self, config: SutrainConfig) -> None:
        if config.encoder_config().context == "bidirectional":
            raise ValueError(
                "context: found bidirectional; a model that sees what follows cannot predict it: load it with "
                "AutoModelForMaskedLM"
            )
        super().__init__(config)

    def generate(self, inputs: Tensor | None = None, *arguments: Any, **keywords: Any) -> Any:
        """As the library's; in context unilm a prompt without token types is of type 0."""
        prompt_BL = keywords.get("input_ids") if inputs is None else inputs
        if prompt_BL is not None and self.config.encoder_config().context == "unilm":
            keywords.setdefault("token_type_ids", torch.zeros_like(prompt_BL))
        return super().generate(inputs, *arguments, **keywords)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]  # what the caller passes by position is this
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        **unused: Any,  # caches, which this model does not keep
    ) -> dict[str, Any]:
        """What a step of generation computes: the whole text, since nothing is kept of the step before."""
        if (
            attention_mask is None
        ):  # so the library writes "all of it"; here that would leave out generated padding
            attention_mask = torch.ones_like(input_ids)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "logits_to_keep": logits_to_keep or 0,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *more: Any, num_new_tokens: int = 1, **others: Any
    ) -> dict[str, Any]:
        """Ahead of the next step: what was generated is of type 1 in context unilm, else of the last token's type."""
        types_BL = model_kwargs.pop("token_type_ids", None)
        others["num_new_tokens"] = num_new_tokens
        kept = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *more, **others)
        if types_BL is not None:
            follows = self.config.encoder_config().context == "unilm"
            last_B1 = torch.ones_like(types_BL[:, -1:]) if follows else types_BL[:, -1:]
            kept["token_type_ids"] = torch.cat([types_BL, last_B1.expand(-1, num_new_tokens)], dim=1)
        return kept

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Scores of the token behind each position, [B, L, V], and with `labels` the loss.

        Args:
            input_ids, attention_mask, token_type_ids, output_hidden_states: see `SutrainModel.forward`.
            labels: [B, L], as `input_ids`, or -100 where nothing is predicted; position i is scored on label i + 1,
                and the loss is the mean.
            logits_to_keep: scores, and the loss, of so many last positions only, or of the positions in a tensor
                [K]; 0: of all.
        """
        encoded = _encode(
            self.model.encoder,
            self.config,
            input_ids,
            attention_mask,
            token_type_ids,
            output_hidden_states,
            output_attentions,
        )
        hidden_BLD = encoded.last_hidden_state
        assert hidden_BLD is not None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BLV = self.model.logits(hidden_BLD[:, kept])
        loss = None
        if labels is not None:
            next_BL = F.pad(labels[:, 1:], (0, 1), value=-100)[:, kept].to(logits_BLV.device)
            loss = F.cross_entropy(logits_BLV.flatten(0, 1).to(torch.float32), next_BL.flatten())
        output = CausalLMOutput(loss=loss, logits=logits_BLV, hidden_states=encoded.hidden_states)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()
