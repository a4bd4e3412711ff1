"""Arguments that all trainers of masked diffusion models share."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args

from transformers import TrainingArguments

SMALLER_IS_BETTER = ("nfe", "mean_entropy")  # of the metrics; of losses TrainingArguments knows it
# Of TrainingArguments, what would change nothing here, and why. All others act as there; `prediction_loss_only` and
# `eval_accumulation_steps` hold already, as predictions are never kept.
WITHOUT_EFFECT = {
    "average_tokens_across_devices": "the loss is always the mean over the rows of all processes",
    "batch_eval_metrics": "there is no `compute_metrics`",
    "eval_do_concat_batches": "predictions are never kept",
    "eval_use_gather_object": "predictions are never kept",
    "include_for_metrics": "there is no `compute_metrics`",
    "label_names": "what is learned are the masked tokens of `input_ids`",
    "label_smoothing_factor": "the losses are defined for the true tokens alone",
    "length_column_name": "the lengths are those of the tokens",
    "liger_kernel_config": "Liger's losses are those of autoregressive models",
    "logging_nan_inf_filter": "a loss that is not finite ends the training",
    "use_cache": "every pass reads the whole row",
    "use_liger_kernel": "Liger's losses are those of autoregressive models",
}


def refuse_what_has_no_effect(args: TrainingArguments, reasons: dict[str, str]) -> None:
    """Refuse the arguments that `reasons` names, where they differ from the defaults of TrainingArguments.

    Raises:
        ValueError: naming the argument, its value, the default and the reason.
    """
    for name, reason in reasons.items():
        known = TrainingArguments.__dataclass_fields__[name]
        value, default = getattr(args, name), known.default
        default = known.default_factory() if default is MISSING else default
        if value != default:
            raise ValueError(
                f"`{name}={value!r}` is not allowed: it must be left at {default!r}, as it would have no effect "
                f"({reason})."
            )


@dataclass
class DiffusionTrainingConfig(TrainingArguments):
    """`TrainingArguments` with what every training of a masked diffusion model needs. Defaults that differ from
    transformers': `learning_rate` 2e-5, `logging_steps` 10, `ddp_find_unused_parameters` False, as each pass uses
    every weight. Where rows differ in length, `train_sampling_strategy="group_by_length"` saves padding.

    Raises:
        ValueError: naming the argument, its value and what is allowed; also for an argument of TrainingArguments that
            would have no effect (`WITHOUT_EFFECT`).
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of `AutoModelForCausalLM.from_pretrained`, if `model` is a name or path."
        },
    )
    response_length: int | None = field(
        default=None,
        metadata={"help": "Fill up or cut responses to this many tokens instead; `max_length` remains the limit."},
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad batches to a multiple of this, so that compiled code sees fewer shapes."}
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
        for each in fields(self):
            is_number = set(get_args(each.type) or (each.type,)) <= {int, float, bool, type(None)}
            if is_number and each.name not in TrainingArguments.__dataclass_fields__:
                self._require(not isinstance(getattr(self, each.name), str), each.name, "a number, and not text")
        for name in ("response_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "at least 1, or None")
        refuse_what_has_no_effect(self, WITHOUT_EFFECT)
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(SMALLER_IS_BETTER):
            self.greater_is_better = False
        super().__post_init__()

    def completed(self, model_type: str, block_causal_length: int | None = None) -> "DiffusionTrainingConfig":
        """A copy in which everything is settled that was left open and depends on the model's family, or on the block
        length of a block-causal model; here nothing does. The trainer works with it."""
        return self

    @property
    def changes_with_progress(self) -> bool:
        """Does anything but the learning rate depend on the share of all steps that is done?"""
        return False

    def _require(self, condition, name, allowed):
        if not condition:
            raise ValueError(f"`{name}={getattr(self, name)!r}` is not allowed: it must be {allowed}.")
