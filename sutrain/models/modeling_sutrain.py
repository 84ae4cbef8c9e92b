"""The encoder behind the Hugging Face interface; the model itself is defined in encoder.py and masked_lm.py.

B batch, L sequence length, D hidden size, V vocabulary. In a file of `SutrainForMaskedLM` or `SutrainForCausalLM` a
weight has the name it was trained under, after the prefix `model.`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
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
        else:
            initialise(module, self.config.encoder_config())


def _encode(
    encoder: Encoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    output_hidden_states: bool | None,
) -> BaseModelOutput:
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: found shape {list(attention_mask.shape)}, expected that of input_ids "
            f"{list(input_ids.shape)}: 0 for padding, and 1 (or the number of its document) for every token"
        )
    document_BL = None if attention_mask is None else attention_mask.long()
    collected: list[Tensor] | None = [] if output_hidden_states else None
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
        """
        output = _encode(
            self.encoder,
            input_ids,
            attention_mask,
            token_type_ids,
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
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
            input_ids,
            attention_mask,
            token_type_ids,
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        logits_BLV = self.model.logits(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BLV.flatten(0, 1).to(torch.float32), labels.flatten())
        output = MaskedLMOutput(loss=loss, logits=logits_BLV, hidden_states=encoded.hidden_states)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


class SutrainForCausalLM(SutrainWithHead, GenerationMixin):
    """A causal model with its head, which predicts the next token. Generation computes the whole text every step; in
    context unilm the prompt is the prefix, which is seen from both sides, and what is generated follows it."""

    def __init__(self, config: SutrainConfig) -> None:
        if config.encoder_config().context == "bidirectional":
            raise ValueError(
                "context: found bidirectional; a model that sees what follows cannot predict it: load it with "
                "AutoModelForMaskedLM"
            )
        super().__init__(config)

    def prepare_inputs_for_generation(  # type: ignore[override]  # what the caller passes by position is this
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> dict[str, Any]:
        """What a step of generation computes: the whole text, since nothing is kept of the step before."""
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
        follows = self.config.encoder_config().context == "unilm"
        if types_BL is None and follows:
            types_BL = torch.zeros_like(
                model_kwargs["attention_mask"]
            )  # as long as the prompt: this was its step
        others["num_new_tokens"] = num_new_tokens
        kept = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *more, **others)
        if types_BL is not None:
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
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **unused: Any,  # generation offers caches, which this model does not keep
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Scores of the token behind each position, [B, L, V], and with `labels` the loss.

        Args:
            input_ids, attention_mask, token_type_ids, output_hidden_states: see `SutrainModel.forward`.
            labels: [B, L], as `input_ids`, or -100 where nothing is predicted; position i is scored on label i + 1,
                and the loss is the mean.
            logits_to_keep: scores of the last positions only; 0: of all.
        """
        encoded = _encode(
            self.model.encoder,
            input_ids,
            attention_mask,
            token_type_ids,
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        hidden_BLD = encoded.last_hidden_state
        assert hidden_BLD is not None
        logits_BLV = self.model.logits(hidden_BLD[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            scores = logits_BLV[:, :-1].flatten(0, 1).to(torch.float32)
            loss = F.cross_entropy(scores, labels[:, 1:].flatten())
        output = CausalLMOutput(loss=loss, logits=logits_BLV, hidden_states=encoded.hidden_states)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()
