"""Arguments of CertaintyForcingTrainer."""

import copy
from dataclasses import dataclass, field

from accelerate.logging import get_logger

from dparallel.hub_cards.model_families import FAMILIES, family_of
from dparallel.modeling import POLICIES

from .diffusion_training_config import DiffusionTrainingConfig

logger = get_logger(__name__)

# Policies that a student is trained for: by what it predicts, and not by a filter, which is trained after it.
STUDENT_POLICIES = tuple(
    name for name, policy in POLICIES.items() if not policy.is_scheduled and name != "learned_filter"
)
MASKINGS = ("block", "response", "trajectory")


@dataclass
class CertaintyForcingConfig(DiffusionTrainingConfig):
    """`DiffusionTrainingConfig` with what certainty-forcing distillation needs. The defaults are what dParallel
    published; what depends on the model's family is left open, and the trainer takes the family's, or LLaDA's where
    nothing was published for it (`ModelFamily`). For the length of the training see the README's recipes.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    max_length: int | None = field(
        default=0,
        metadata={
            "help": "Tokens of prompt and response together. Longer responses are cut, shorter ones are filled up "
            "with end-of-text, which is learned as well. None: no limit, and one end-of-text. 0: the lengths of the "
            "family, 384 for both together (LLaDA), or 256 for the response alone (Dream). For a block-causal model, "
            "responses are filled up to the end of a block only, unless `response_length` is given."
        },
    )
    masking: str | None = field(
        default=None,
        metadata={
            "help": "Which tokens are hidden. 'block': of a random block, with all behind it hidden and not scored "
            "(default for LLaDA). 'response': of the whole response (for Dream). 'trajectory': as 'block', but in the "
            "order in which the teacher wrote them, from the column `unmasking_step`. A block-causal model sees all "
            "its blocks at once, each scored under a ratio of its own, with 'block' and 'trajectory'.",
            "choices": list(MASKINGS),
        },
    )
    block_length: int = field(
        default=32,
        metadata={
            "help": "Tokens per block; the last one may be shorter. Not used by 'response'. The block length of a "
            "block-causal model takes the place of the default."
        },
    )
    mask_ratio: float = field(
        default=0.5, metadata={"help": "Share of the block or response that the first view hides, in (0, 1]."}
    )
    mask_ratio_low: float | None = field(
        default=None, metadata={"help": "Draw the ratio of each example uniformly from this to `mask_ratio`."}
    )
    complementary: bool = field(
        default=True, metadata={"help": "Add a second view that scores the tokens that the first one leaves."}
    )
    block_length_start: int | None = field(
        default=None,
        metadata={
            "help": "Let the block length grow from this to `block_length` during training. Not with 'response'."
        },
    )
    mask_ratio_start: float | None = field(
        default=None, metadata={"help": "Let the mask ratio go from this to `mask_ratio` during training."}
    )
    trajectory_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy with the teacher's answer."}
    )
    certainty_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the entropy of tokens that are predicted right already: 2 (LLaDA) or 1 (Dream)."},
    )
    certainty_temperature: float = field(default=0.5, metadata={"help": "Temperature of that entropy, above 0."})
    unmasking: str = field(
        default="entropy_threshold",
        metadata={
            "help": "Policy that the student will decode with: for `unmasked_share` in the log, and for evaluation.",
            "choices": list(STUDENT_POLICIES),
        },
    )
    threshold: float | None = field(default=None, metadata={"help": "Threshold of that policy; None: its default."})
    eval_decoding_samples: int = field(
        default=0,
        metadata={"help": "At evaluation, decode the first N prompts of the evaluation dataset. 0: no decoding."},
    )
    eval_max_new_tokens: int = field(default=256, metadata={"help": "Length of the answers that are decoded."})
    eval_decoding_batch_size: int = field(default=8, metadata={"help": "Prompts that each process decodes at a time."})

    def __post_init__(self):
        super().__post_init__()
        self._require(self.max_length is None or self.max_length >= 0, "max_length", "at least 1, None, or 0")
        allowed = f"one of {', '.join(map(repr, MASKINGS))}, or None"
        self._require(self.masking in (*MASKINGS, None), "masking", allowed)
        self._require((self.block_length or 0) >= 1, "block_length", "at least 1 (`masking='response'` ignores it)")
        start = self.block_length_start
        self._require(start is None or 1 <= start, "block_length_start", "at least 1, or None")
        self._require(0 < self.mask_ratio <= 1, "mask_ratio", "above 0 and at most 1")
        for name in ("mask_ratio_low", "mask_ratio_start"):
            self._require(getattr(self, name) is None or 0 <= getattr(self, name) <= 1, name, "from 0 to 1, or None")
        self._require(0 <= self.trajectory_weight, "trajectory_weight", "at least 0")
        weight = self.certainty_weight
        self._require(weight is None or 0 <= weight, "certainty_weight", "at least 0, or None")
        self._require(0 < self.certainty_temperature, "certainty_temperature", "above 0")
        allowed = f"one of {', '.join(map(repr, STUDENT_POLICIES))}"
        self._require(self.unmasking in STUDENT_POLICIES, "unmasking", allowed)
        policy = POLICIES[self.unmasking]
        if self.threshold is None:
            self.threshold = policy.default
        self._require(policy.allows(self.threshold), "threshold", f"{policy.range} for `unmasking={self.unmasking!r}`")
        self._require(self.eval_decoding_samples >= 0, "eval_decoding_samples", "at least 0")
        for name in ("eval_max_new_tokens", "eval_decoding_batch_size"):
            self._require(getattr(self, name) >= 1, name, "at least 1")

    def completed(self, model_type: str, block_causal_length: int | None = None) -> "CertaintyForcingConfig":
        known = family_of(model_type) if block_causal_length is None else None  # dParallel's models see everything
        published = {} if known is None else known.distillation
        settled, family = copy.copy(self), published or FAMILIES["llada"].distillation
        for name in ("masking", "certainty_weight", *(("response_length",) if self.max_length == 0 else ())):
            if getattr(self, name) is None:
                setattr(settled, name, family[name])
        if self.max_length == 0:
            settled.max_length = family["max_length"]
        if block_causal_length is not None:
            allowed = f"{block_causal_length}, the block length of the model"
            self._require(self.block_length in (32, block_causal_length), "block_length", allowed)
            self._require(self.block_length_start is None, "block_length_start", "None for a block-causal model")
            self._require(self.masking != "response", "masking", "'block' or 'trajectory' for a block-causal model")
            settled.block_length = block_causal_length
        is_used = self.block_length_start is None or settled.masking != "response"
        self._require(is_used, "block_length_start", f"None with `masking={settled.masking!r}`, which has no blocks")
        if not published and vars(settled) != vars(self):
            what = f"the model type {model_type!r}" if block_causal_length is None else "block-causal models"
            logger.warning(f"Nothing was published for {what}: LLaDA's settings are used.")
        return settled

    @property
    def changes_with_progress(self) -> bool:
        return self.mask_ratio_start is not None or self.block_length_start is not None

    @property
    def decoding(self) -> dict:
        """The arguments of `generate()` that the student is trained for."""
        settings = {"unmasking": self.unmasking, "threshold": self.threshold}
        return settings if self.masking == "response" else {**settings, "block_length": self.block_length}
