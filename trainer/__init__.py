"""Training of masked diffusion language models in the shape of TRL."""

from .masked_diffusion_config import MaskedDiffusionConfig
from .masked_diffusion_trainer import DataCollatorForMaskedDiffusion, MaskedDiffusionTrainer

__all__ = ["DataCollatorForMaskedDiffusion", "MaskedDiffusionConfig", "MaskedDiffusionTrainer"]
