"""Models, decoding policies and `generate()`; importing it registers the models with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_llada import LLaDAConfig
from .generation_diffusion import DiffusionGenerationConfig, DiffusionGenerationMixin, DiffusionGenerationOutput
from .modeling_llada import LLaDAModel, LLaDAModelLM
from .token_statistics import TokenStatistics, token_statistics
from .unmasking import POLICIES

__all__ = [
    "POLICIES",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
    "DiffusionGenerationOutput",
    "LLaDAConfig",
    "LLaDAModel",
    "LLaDAModelLM",
    "TokenStatistics",
    "token_statistics",
]

AutoConfig.register("llada", LLaDAConfig)
AutoModel.register(LLaDAConfig, LLaDAModelLM)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAModelLM)
