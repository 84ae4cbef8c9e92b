"""Importing this module teaches transformers the model type `sutrain`.

After it, `AutoConfig`, `AutoModel`, `AutoModelForMaskedLM` and `AutoTokenizer` load an exported folder with
the code installed here, without trust_remote_code, and `save_pretrained` puts the code into the folder too.
"""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from .models.configuration_sutrain import SutrainConfig
from .models.modeling_sutrain import SutrainForMaskedLM, SutrainModel
from .models.tokenization_sutrain import SutrainTokenizer

__all__ = ["AUTO_MAP", "SutrainConfig", "SutrainForMaskedLM", "SutrainModel", "SutrainTokenizer"]

AUTO_MAP = {
    "AutoConfig": "configuration_sutrain.SutrainConfig",
    "AutoModel": "modeling_sutrain.SutrainModel",
    "AutoModelForMaskedLM": "modeling_sutrain.SutrainForMaskedLM",
}
"""Which class of which file in an exported folder serves which automatic class."""

AutoConfig.register(SutrainConfig.model_type, SutrainConfig)
AutoModel.register(SutrainConfig, SutrainModel)
AutoModelForMaskedLM.register(SutrainConfig, SutrainForMaskedLM)
AutoTokenizer.register(SutrainConfig, SutrainTokenizer)

SutrainConfig.register_for_auto_class()
SutrainModel.register_for_auto_class("AutoModel")
SutrainForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
SutrainTokenizer.register_for_auto_class()
