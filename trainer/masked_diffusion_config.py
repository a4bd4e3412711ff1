"""Arguments of MaskedDiffusionTrainer."""

import copy
from dataclasses import dataclass, field

from .diffusion_training_config import DiffusionTrainingConfig
from .losses import LOSS_WEIGHTINGS


@dataclass
class MaskedDiffusionConfig(DiffusionTrainingConfig):
    """`DiffusionTrainingConfig` with what LLaDA's objective needs.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    max_length: int | None = field(
        default=384,
        metadata={
            "help": "Tokens of prompt and response together. Longer responses are cut, shorter ones are filled up "
            "with end-of-text, which is learned as well. None: no limit, and one end-of-text. For a block-causal "
            "model, responses are filled up to the end of a block only, unless `response_length` is given."
        },
    )
    block_length: int | None = field(
        default=None,
        metadata={
            "help": "Mask every second example as block-wise decoding with this block length sees it: all tokens "
            "behind a random block hidden and not scored, all before it shown. None: LLaDA's random masks only. A "
            "block-causal model is trained on all its blocks at once: None, or their length."
        },
    )
    loss_weighting: str = field(
        default="inverse_t",
        metadata={
            "help": "'inverse_t' (LLaDA's bound on the likelihood), 'uniform' (mean over a row's masked tokens) or "
            "'token' (all masked tokens alike).",
            "choices": list(LOSS_WEIGHTINGS),
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_length", "block_length"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "at least 1, or None")
        allowed = f"one of {', '.join(map(repr, LOSS_WEIGHTINGS))}"
        self._require(self.loss_weighting in LOSS_WEIGHTINGS, "loss_weighting", allowed)

    def completed(self, model_type: str, block_causal_length: int | None = None) -> "MaskedDiffusionConfig":
        if block_causal_length is None:
            return self
        allowed = f"None or {block_causal_length}, the block length of the model"
        self._require(self.block_length in (None, block_causal_length), "block_length", allowed)
        settled = copy.copy(self)
        settled.block_length = block_causal_length
        return settled
