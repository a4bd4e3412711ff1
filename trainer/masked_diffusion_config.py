"""Arguments of MaskedDiffusionTrainer."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .losses import LOSS_WEIGHTINGS

SMALLER_IS_BETTER = ("nfe", "mean_entropy")  # of the metrics; of losses TrainingArguments knows it


@dataclass
class MaskedDiffusionConfig(TrainingArguments):
    """`TrainingArguments` with what masked diffusion needs. Defaults that differ from transformers': `learning_rate`
    2e-5, `logging_steps` 10, `ddp_find_unused_parameters` False, as each pass uses every weight. Where rows differ in
    length (`max_length=None`, or a `response_length`), `train_sampling_strategy="group_by_length"` saves padding.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of `AutoModelForCausalLM.from_pretrained`, if `model` is a name or path."
        },
    )
    max_length: int | None = field(
        default=384,
        metadata={
            "help": "Tokens of prompt and response together. Longer responses are cut, shorter ones are filled up "
            "with end-of-text, which is learned as well. None: no limit, and one end-of-text."
        },
    )
    response_length: int | None = field(
        default=None,
        metadata={"help": "Fill up or cut responses to this many tokens instead; `max_length` remains the limit."},
    )
    block_length: int | None = field(
        default=None,
        metadata={
            "help": "Mask every second example as block-wise decoding with this block length sees it: all tokens "
            "behind a random block hidden and not scored, all before it shown. None: LLaDA's random masks only."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad batches to a multiple of this, so that compiled code sees fewer shapes."}
    )
    loss_weighting: str = field(
        default="inverse_t",
        metadata={
            "help": "'inverse_t' (LLaDA's bound on the likelihood), 'uniform' (mean over a row's masked tokens) or "
            "'token' (all masked tokens alike).",
            "choices": list(LOSS_WEIGHTINGS),
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes for tokenizing the dataset; None for this one."}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every X updates steps; a share of all steps if smaller than 1."}
    )

    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks, in each pass, for weights that it did not use."}
    )

    def __post_init__(self):
        for name in ("max_length", "response_length", "block_length", "pad_to_multiple_of"):
            value, is_left_open = getattr(self, name), type(self).__dataclass_fields__[name].default == 0
            self._require(value is None or value >= 1 or (value == 0 and is_left_open), name, "at least 1, or None")
        allowed = f"one of {', '.join(map(repr, LOSS_WEIGHTINGS))}"
        self._require(self.loss_weighting in LOSS_WEIGHTINGS, "loss_weighting", allowed)
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(SMALLER_IS_BETTER):
            self.greater_is_better = False
        super().__post_init__()

    def completed(self, model_type: str) -> "MaskedDiffusionConfig":
        """A copy in which everything is settled that was left open and depends on the model's family; here nothing is.
        The trainer works with it."""
        return self

    def _require(self, condition, name, allowed):
        if not condition:
            raise ValueError(f"`{name}={getattr(self, name)!r}` is not allowed: it must be {allowed}.")
