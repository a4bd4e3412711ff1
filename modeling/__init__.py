# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Models, decoding policies and `generate()`; importing it registers the models with transformers' Auto classes."""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_dream import DreamConfig
from .configuration_llada import LLaDAConfig
from .configuration_sdar import SDARConfig
from .generation_config_diffusion import DiffusionGenerationConfig
from .generation_diffusion import DiffusionGenerationMixin, DiffusionGenerationOutput
from .modeling_dream import DreamBaseModel, DreamModel
from .modeling_llada import LLaDAModel, LLaDAModelLM
from .modeling_sdar import SDARForCausalLM, SDARModel
from .token_statistics import TokenStatistics, token_statistics
from .tokenization_dream import DreamTokenizer
from .unmasking import POLICIES, SCHEDULES, Policy
from .unmasking_filter import UnmaskingFilter, UnmaskingFilterConfig

__all__ = [
    "POLICIES",
    "SCHEDULES",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
    "DiffusionGenerationOutput",
    "DreamBaseModel",
    "DreamConfig",
    "DreamModel",
    "DreamTokenizer",
    "LLaDAConfig",
    "LLaDAModel",
    "LLaDAModelLM",
    "Policy",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARModel",
    "TokenStatistics",
    "UnmaskingFilter",
    "UnmaskingFilterConfig",
    "__version__",
    "token_statistics",
]

try:
    __version__ = version("dparallel")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

for config, model in ((LLaDAConfig, LLaDAModelLM), (DreamConfig, DreamModel), (SDARConfig, SDARForCausalLM)):
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForCausalLM.register(config, model)
AutoConfig.register(UnmaskingFilterConfig.model_type, UnmaskingFilterConfig)
AutoModel.register(UnmaskingFilterConfig, UnmaskingFilter)
