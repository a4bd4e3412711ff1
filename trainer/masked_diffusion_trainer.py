"""Pretraining and fine-tuning of masked diffusion language models with LLaDA's own objective."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, set_seed
from trl import is_conversational, maybe_apply_chat_template

import dparallel.modeling  # noqa: F401  (registers the model families with AutoModelForCausalLM)

from .losses import masked_diffusion_loss, prediction_metrics
from .masked_diffusion_config import MaskedDiffusionConfig
from .masking import EVALUATION_EPOCH, gather_positions, mixed_masks, random_masks, response_mask

logger = get_logger(__name__)

BATCH_COLUMNS = ["input_ids", "prompt_length", "example_id"]


@dataclass
class DataCollatorForMaskedDiffusion:
    """Rows of `input_ids`, `prompt_length`, `example_id` to a batch: `input_ids` and `attention_mask` (B, T), padded
    behind, and `prompt_length` and `example_id` (B,).

    `attention_mask` is 0 only behind a row's own tokens. End-of-text that fills up a response is one of its tokens,
    even where `pad_token_id` is the same id.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows):
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        lengths = torch.tensor([len(row) for row in ids])
        multiple = self.pad_to_multiple_of or 1
        width = -(-int(lengths.max()) // multiple) * multiple
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("prompt_length", "example_id")}
        batch["input_ids"] = torch.full((len(ids), width), self.pad_token_id)
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        batch["input_ids"][batch["attention_mask"].bool()] = torch.cat(ids)
        return batch


class MaskedDiffusionTrainer(Trainer):
    """Trainer for masked diffusion language models ("Large Language Diffusion Models",
    https://arxiv.org/abs/2502.09992), in the shape of TRL's trainers.

    Any model trains that has `config.mask_token_id`, an attribute `logits_shift`, and a `forward(input_ids,
    attention_mask, logits_to_keep)` whose `logits_to_keep` takes positions of shape (B, M), as transformers' does.

    Args:
        model (`str` or `PreTrainedModel`): name or path for `AutoModelForCausalLM.from_pretrained`, or the model.
        args (`MaskedDiffusionConfig`, *optional*): settings.
        data_collator (*optional*): defaults to `DataCollatorForMaskedDiffusion`.
        train_dataset, eval_dataset (`Dataset`, `IterableDataset`, or for evaluation a dict of them): rows with
            `prompt` and `completion` (text or messages), `messages` (the last one, the assistant's, is the response),
            `text` (all of it is learned), or `input_ids` and `prompt_length`.
        processing_class (`PreTrainedTokenizerBase`, *optional*): defaults to the model's own tokenizer.
        compute_metrics: refused; masked accuracy and confidence are always reported.
        callbacks, optimizers: as in `Trainer`.
        peft_config (`PeftConfig`, *optional*): wraps the model in an adapter.

    Logged besides the loss: `masked_accuracy` (share of masked tokens whose prediction is right) and `mean_confidence`
    (probability of the predicted token at masked positions), at evaluation with the prefix `eval_`.
    """

    _tag_names = ["dparallel", "diffusion", "dllm"]
    _name = "Masked diffusion"
    _paper = {"title": "Large Language Diffusion Models", "id": "2502.09992"}

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: MaskedDiffusionConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict | None = None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        peft_config=None,
    ):
        if compute_metrics is not None:
            raise ValueError("`compute_metrics` is not supported: logits of whole batches are never kept.")
        if args is None:
            args = MaskedDiffusionConfig(
                output_dir=f"{Path(str(model)).name if isinstance(model, str) else 'model'}-ft"
            )
        set_seed(args.seed)
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **(args.model_init_kwargs or {}))
        elif args.model_init_kwargs is not None:
            raise ValueError("`model_init_kwargs` was given, but `model` is already loaded: they would be ignored.")
        if getattr(model.config, "mask_token_id", None) is None:
            raise ValueError("`model.config.mask_token_id` is not set: a masked diffusion model needs a mask token.")
        if processing_class is None:
            source = {
                k: v for k, v in (args.model_init_kwargs or {}).items() if k in ("trust_remote_code", "revision")
            }
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path, **source)
        if processing_class.eos_token_id is None:
            raise ValueError("`processing_class` has no `eos_token`: responses need an end-of-text.")
        self.mask_token_id = model.config.mask_token_id
        self.logits_shift = model.logits_shift
        if peft_config is not None:
            model = self._wrap_in_adapter(model, args, peft_config)
        if data_collator is None:
            pad_token_id = processing_class.pad_token_id
            data_collator = DataCollatorForMaskedDiffusion(
                processing_class.eos_token_id if pad_token_id is None else pad_token_id, args.pad_to_multiple_of
            )
        if train_dataset is not None:
            train_dataset = self._prepare_dataset(train_dataset, "train_dataset", processing_class, args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_dataset(dataset, f"eval_dataset[{name!r}]", processing_class, args)
                for name, dataset in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, "eval_dataset", processing_class, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss is a mean over the micro-batch: without this, Trainer takes it for a sum over the whole batch.
        self.model_accepts_loss_kwargs = False
        self._totals = {"train": torch.zeros(3), "eval": torch.zeros(3)}
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    @staticmethod
    def _wrap_in_adapter(model, args, peft_config):
        from peft import PeftModel, get_peft_model

        if isinstance(model, PeftModel):
            raise ValueError("`peft_config` was given, but `model` already is a PeftModel: pass one or the other.")
        if args.gradient_checkpointing:
            model.enable_input_require_grads()  # the frozen embedding would cut the checkpointed graph off
        return get_peft_model(model, peft_config)

    def _prepare_dataset(self, dataset, name, processing_class, args):
        """Tokenize, number the examples, and drop those without a response, saying how many."""
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"`{name}` is empty: it must hold at least one example.")
        is_tokenized = {"input_ids", "prompt_length"} <= set(first)
        if not is_tokenized and not {"prompt", "completion"} <= set(first) and not {"messages", "text"} & set(first):
            raise ValueError(
                f"`{name}` has the columns {sorted(first)}: it must have `prompt` and `completion`, or `messages`, or "
                "`text`, or `input_ids` and `prompt_length`."
            )

        def prepare(example, index):
            if is_tokenized:
                row = {key: example[key] for key in ("input_ids", "prompt_length")}
            else:
                row = tokenize_example(example, processing_class, args.max_length, args.response_length)
            return {**row, "example_id": example.get("example_id", index)}

        def has_response(row):
            return row["prompt_length"] < len(row["input_ids"])

        columns = [column for column in first if column not in BATCH_COLUMNS]
        if isinstance(dataset, IterableDataset):
            return dataset.map(prepare, with_indices=True, remove_columns=columns).filter(has_response)
        options = {"num_proc": args.dataset_num_proc}
        prepared = dataset.map(
            prepare, with_indices=True, remove_columns=columns, desc=f"Tokenizing {name}", **options
        )
        kept = prepared.filter(has_response, desc=f"Checking {name}", **options)
        if dropped := len(prepared) - len(kept):
            logger.warning(
                f"`{name}`: {dropped} of {len(prepared)} examples dropped, because nothing of their response lies "
                f"within `max_length={args.max_length}`."
            )
        if len(kept) == 0:
            raise ValueError(
                f"`{name}` has no example with a response within `max_length={args.max_length}` tokens: raise it."
            )
        return kept

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*BATCH_COLUMNS, "attention_mask"]

    def draw_masks(self, response, **randomness):
        """The masks of a batch: (B, T) bool, the tokens that are learned -> `masking.Masks`."""
        if self.args.block_length is None:
            return random_masks(response, **randomness)
        return mixed_masks(response, self.args.block_length, **randomness)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if model.training else "eval"
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        masks = self.draw_masks(
            response_mask(inputs["prompt_length"], attention_mask, self.logits_shift),
            seed=self.args.seed,
            epoch=math.floor(self.state.epoch or 0) if mode == "train" else EVALUATION_EPOCH,
            example_id=inputs["example_id"],
        )
        # Only scored positions go through the head: there are never logits of whole sequences.
        positions, is_scored = gather_positions(masks.scored)
        outputs = model(
            input_ids=input_ids.masked_fill(masks.hidden, self.mask_token_id),
            attention_mask=attention_mask,
            logits_to_keep=positions - self.logits_shift * is_scored,
        )
        labels = input_ids.gather(1, positions)
        loss = masked_diffusion_loss(
            outputs.logits, labels, is_scored, masks.ratio, masks.span_length, self.args.loss_weighting
        )
        metrics = prediction_metrics(outputs.logits, labels, is_scored)
        self._totals[mode] = self._totals[mode].to(metrics.device) + metrics
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _pop_metrics(self, mode):
        """Means over all processes since the last time."""
        totals = self._totals[mode].to(self.accelerator.device)
        right, confidence, count = self.accelerator.reduce(totals, "sum").tolist()
        self._totals[mode] = torch.zeros(3)
        return {"masked_accuracy": right / count, "mean_confidence": confidence / count} if count else {}

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._totals["eval"] = torch.zeros(3)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Into the metrics and not only into the log, so that the best checkpoint can be chosen by them.
        output.metrics.update({f"{metric_key_prefix}_{key}": v for key, v in self._pop_metrics("eval").items()})
        return output

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **self._pop_metrics("train")}
        super().log(logs, *args, **kwargs)


def tokenize_example(example, tokenizer, max_length=None, response_length=None):
    """One row of a dataset to `input_ids` and `prompt_length`. The response ends with end-of-text, and is filled up
    with it to `response_length` tokens, or to `max_length` for prompt and response; `text` is not filled up."""
    if "messages" in example:
        *prompt, answer = example["messages"]
        if answer["role"] != "assistant":
            raise ValueError(f"`messages` must end with the assistant's, but the last role is {answer['role']!r}.")
        example = {"prompt": prompt, "completion": [answer]}
    eos = tokenizer.eos_token_id
    if "prompt" not in example:
        ids = [*tokenizer(example["text"])["input_ids"], eos]
        return {"input_ids": ids[:max_length], "prompt_length": 0}
    # A chat template writes its own special tokens.
    add_special_tokens = not is_conversational(example)
    example = maybe_apply_chat_template({key: example[key] for key in ("prompt", "completion")}, tokenizer)
    prompt = tokenizer(example["prompt"], add_special_tokens=add_special_tokens)["input_ids"]
    response = [*tokenizer(example["completion"], add_special_tokens=False)["input_ids"], eos]
    length = response_length or (max_length or 0) - len(prompt)
    response = response[:response_length] + [eos] * (length - len(response))
    return {"input_ids": [*prompt, *response][:max_length], "prompt_length": len(prompt)}
