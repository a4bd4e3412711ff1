"""Training of masked diffusion language models in the shape of TRL."""

from dparallel.hub_cards.command_line import needs_extra
from dparallel.modeling import __version__

with needs_extra("train"):
    from .certainty_forcing_config import CertaintyForcingConfig
    from .certainty_forcing_trainer import CertaintyForcingTrainer
    from .checkpoints import last_complete_checkpoint
    from .diffusion_training_config import DiffusionTrainingConfig
    from .filter_trainer import (
        FilterConfig,
        FilterTrainer,
        acceptance_rates,
        oracle_passes,
        record_oracle,
        split_by_prompt,
    )
    from .from_autoregressive import from_autoregressive
    from .masked_diffusion_config import MaskedDiffusionConfig
    from .masked_diffusion_trainer import DataCollatorForMaskedDiffusion, MaskedDiffusionTrainer
    from .trajectories import generate_trajectories

__all__ = [
    "CertaintyForcingConfig",
    "CertaintyForcingTrainer",
    "DataCollatorForMaskedDiffusion",
    "DiffusionTrainingConfig",
    "FilterConfig",
    "FilterTrainer",
    "MaskedDiffusionConfig",
    "MaskedDiffusionTrainer",
    "__version__",
    "acceptance_rates",
    "from_autoregressive",
    "generate_trajectories",
    "last_complete_checkpoint",
    "oracle_passes",
    "record_oracle",
    "split_by_prompt",
]
