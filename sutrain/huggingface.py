"""Importing this module teaches transformers the model type `sutrain`.

After it, `AutoConfig`, `AutoModel`, `AutoModelForMaskedLM`, `AutoModelForCausalLM` and `AutoTokenizer` load an
exported folder with the code installed here, without trust_remote_code, and `save_pretrained` puts the code into the
folder too.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from .models.configuration_sutrain import SutrainConfig
from .models.modeling_sutrain import SutrainForCausalLM, SutrainForMaskedLM, SutrainModel
from .models.tokenization_sutrain import SutrainTokenizer

__all__ = [
    "AUTO_MAP",
    "SutrainConfig",
    "SutrainForCausalLM",
    "SutrainForMaskedLM",
    "SutrainModel",
    "SutrainTokenizer",
]

AUTO_MAP = {
    "AutoConfig": "configuration_sutrain.SutrainConfig",
    "AutoModel": "modeling_sutrain.SutrainModel",
    "AutoModelForMaskedLM": "modeling_sutrain.SutrainForMaskedLM",
    "AutoModelForCausalLM": "modeling_sutrain.SutrainForCausalLM",
}
"""Which class of which file in an exported folder serves which automatic class."""

AutoConfig.register(SutrainConfig.model_type, SutrainConfig)
AutoModel.register(SutrainConfig, SutrainModel)
AutoModelForMaskedLM.register(SutrainConfig, SutrainForMaskedLM)
AutoModelForCausalLM.register(SutrainConfig, SutrainForCausalLM)
AutoTokenizer.register(SutrainConfig, SutrainTokenizer)

SutrainConfig.register_for_auto_class()
SutrainModel.register_for_auto_class("AutoModel")
SutrainForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
SutrainForCausalLM.register_for_auto_class("AutoModelForCausalLM")
SutrainTokenizer.register_for_auto_class()
