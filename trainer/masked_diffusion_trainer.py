"""Pretraining and fine-tuning of masked diffusion language models with LLaDA's own objective."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo, HfApi
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, HubStrategy, TrainOutput, has_length

from dparallel.hub_cards.card_metadata import as_list
from dparallel.hub_cards.hub_ids import check_folder_or_hub_id
from dparallel.hub_cards.model_cards import model_card
from dparallel.hub_cards.upload import files_to_push, upload
from dparallel.modeling import token_statistics  # also registers the model families with AutoModelForCausalLM
from dparallel.modeling.layers import FLEX_ATTENTION

from .block_streams import block_streams, by_views
from .checkpoints import (
    DEEPSPEED,
    FSDP,
    PLAIN,
    last_complete_checkpoint,
    layout_of,
    load_optimizer,
    load_weights,
    plain_name,
)
from .diffusion_training_config import DiffusionTrainingConfig
from .lora import complete_lora_config
from .losses import masked_diffusion_losses, prediction_metrics
from .masked_diffusion_config import MaskedDiffusionConfig
from .masking import EVALUATION_EPOCH, Masks, gather_positions, mixed_masks, random_masks, response_mask
from .run_settings import SETTINGS_FILE, changed_settings, model_settings, run_settings, save_settings
from .tokenization import DATASET_FORMATS, has_response, padding_share, prepare_example
from .training_record import hub_datasets, save_training_record, training_record

logger = get_logger(__name__)

OF_A_RUN = ("trainer_state.json", SETTINGS_FILE)  # in a checkpoint, beside the model
BATCH_COLUMNS = ["input_ids", "prompt_length", "example_id", "unmasking_step"]


@dataclass
class DataCollatorForMaskedDiffusion:
    """Rows of `input_ids`, `prompt_length`, `example_id` to a batch: `input_ids` and `attention_mask` (B, T), padded
    behind, and `prompt_length` and `example_id` (B,). Where rows have `unmasking_step`, so has the batch (B, T), -1 at
    the padding.

    `attention_mask` is 0 only behind a row's own tokens. End-of-text that fills up a response is one of its tokens,
    even where `pad_token_id` is the same id.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        lengths = torch.tensor([len(row) for row in ids])
        multiple = self.pad_to_multiple_of or 1
        width = -(-int(lengths.max()) // multiple) * multiple
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("prompt_length", "example_id")}
        batch["input_ids"] = torch.full((len(ids), width), self.pad_token_id)
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        is_real = batch["attention_mask"].bool()
        batch["input_ids"][is_real] = torch.cat(ids)
        if "unmasking_step" in rows[0]:
            batch["unmasking_step"] = torch.full_like(batch["input_ids"], -1)
            batch["unmasking_step"][is_real] = torch.cat([torch.as_tensor(row["unmasking_step"]) for row in rows])
        return batch


class MaskedDiffusionTrainer(Trainer):
    """Trainer for masked diffusion language models ("Large Language Diffusion Models",
    https://arxiv.org/abs/2502.09992), in the shape of TRL's trainers.

    Any model trains that has `config.mask_token_id`, an attribute `logits_shift`, and a `forward(input_ids,
    attention_mask, logits_to_keep)` whose `logits_to_keep` takes positions of shape (B, M), as transformers' does. One
    with a `config.block_causal_length` is trained on all blocks of a row at once, each under a mask ratio of its own
    (`block_streams.py`); its `forward` also gets `position_ids` (1, T), and an `attention_mask` (B or 1, 1, T, T) or a
    `BlockMask`.

    Under DDP one with weights that a pass may leave out, as experts, needs `ddp_find_unused_parameters=True`.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): name or path for `AutoModelForCausalLM.from_pretrained`, or the
            model.
        args (`MaskedDiffusionConfig`, *optional*): settings.
        data_collator (*optional*): defaults to `DataCollatorForMaskedDiffusion`.
        train_dataset, eval_dataset (`Dataset`, `IterableDataset`, or for evaluation a dict of them): rows with
            `prompt` and `completion` (text or messages), `messages` (the last one, the assistant's, is the response),
            `text` (all of it is learned), or `input_ids` and `prompt_length`, with or without `unmasking_step`
            (of each response token), as `trajectories.generate_trajectories` makes them. Messages may have `tools` and
            `chat_template_kwargs` beside them, and are rendered as by TRL.
        processing_class (`PreTrainedTokenizerBase`, *optional*): defaults to the tokenizer of where the model was
            loaded from.
        compute_metrics: refused; masked accuracy and confidence are always reported.
        callbacks, optimizers: as in `Trainer`.
        peft_config (`PeftConfig`, *optional*): wraps the model in an adapter. Those of virtual tokens are refused:
            prompt tuning, P-tuning, prefix tuning.

    Logged besides the loss: `masked_accuracy` (share of masked tokens whose prediction is right), `mean_confidence`
    (probability of the predicted token at masked positions) and `mean_entropy` (there, in nats); at evaluation with
    the prefix `eval_`.
    """

    _name = "masked diffusion training"
    _paper = {"title": "Large Language Diffusion Models", "id": "2502.09992"}
    _tag_names = ["dparallel", "diffusion", "dllm"]
    _config_class: type[DiffusionTrainingConfig] = MaskedDiffusionConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: MaskedDiffusionConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if compute_metrics is not None:
            raise ValueError("`compute_metrics` is not supported: logits of whole batches are never kept.")
        if args is None:
            args = MaskedDiffusionConfig(
                output_dir=f"{Path(model).name if isinstance(model, (str, Path)) else 'model'}-ft"
            )
        if not isinstance(args, self._config_class):
            raise ValueError(f"`args` is a {type(args).__name__}: it must be a {self._config_class.__name__}.")
        set_seed(args.seed)
        init_kwargs: Any = args.model_init_kwargs or {}  # JSON of a command is a dict by now
        if peft_config is not None and not isinstance(peft_config, PeftConfig):
            raise ValueError(f"`peft_config={peft_config!r}` is not allowed: it must be a PeftConfig, as LoraConfig.")
        if isinstance(model, (str, Path)):
            check_folder_or_hub_id("model", model)
            model = AutoModelForCausalLM.from_pretrained(model, **init_kwargs)
        elif args.model_init_kwargs is not None:
            raise ValueError("`model_init_kwargs` was given, but `model` is already loaded: they would be ignored.")
        if getattr(model.config, "mask_token_id", None) is None:
            raise ValueError("`model.config.mask_token_id` is not set: a masked diffusion model needs a mask token.")
        self.block_causal_length = getattr(model.config, "block_causal_length", None)
        args = args.completed(model.config.model_type, self.block_causal_length)
        if processing_class is None:
            source = {name: init_kwargs[name] for name in ("trust_remote_code", "revision") if name in init_kwargs}
            processing_class = self._tokenizer_of(model, source)
        if processing_class.eos_token_id is None:
            raise ValueError("`processing_class` has no `eos_token`: responses need an end-of-text.")
        self.mask_token_id = model.config.mask_token_id
        self.max_position_embeddings = getattr(model.config, "max_position_embeddings", None)
        self.logits_shift = model.logits_shift
        if peft_config is not None:
            model = self._wrap_in_adapter(model, args, peft_config)
        for adapter in model.peft_config.values() if isinstance(model, PeftModel) else ():
            if adapter.is_prompt_learning:
                raise ValueError(
                    f"Adapters of type {adapter.peft_type.value} are not supported: their virtual tokens stand before "
                    f"the text, and the positions that are learned would be others. Use LoRA, for example."
                )
        if data_collator is None:
            pad_token_id = processing_class.pad_token_id
            data_collator = DataCollatorForMaskedDiffusion(
                processing_class.eos_token_id if pad_token_id is None else pad_token_id, args.pad_to_multiple_of
            )
        # Before weights are sharded. (DeepSpeed's ZeRO-3 has done so, and keeps their shapes.)
        shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in model.named_parameters()}
        self._vectors = {name for name, shape in shapes.items() if len(shape) < 2}
        self._model_settings = model_settings(model)
        self._hub_datasets = hub_datasets(train_dataset)
        if train_dataset is not None:
            train_dataset = self._prepare_dataset(train_dataset, "train_dataset", processing_class, args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_dataset(dataset, f"eval_dataset[{name!r}]", processing_class, args)
                for name, dataset in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, "eval_dataset", processing_class, args)
        if isinstance(train_dataset, IterableDataset) and args.accelerator_config.dispatch_batches is None:
            # Each process reads its part: from the first one's, batches would have to be of one width.
            args.accelerator_config.dispatch_batches = False
        if self.block_causal_length is not None and args.n_gpu > 1:
            raise ValueError(
                f"A block-causal model is not trained by one process with {args.n_gpu} GPUs (DataParallel): run the "
                f"script by `accelerate launch`, with a process for each, or let CUDA_VISIBLE_DEVICES name one."
            )
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
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.activation_checkpointing and isinstance(self.model, PeftModel):
            raise ValueError(  # peft does not look for them inside the wrappers
                "`fsdp_activation_checkpointing: true` is not allowed with an adapter, which would be saved without "
                "its weights: set `gradient_checkpointing=True` instead."
            )
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError(
                "`parallelism_config` with context or sequence parallelism is not allowed: the masks and losses of a "
                "row need all of it on one device."
            )
        # So Trainer does not divide by the number of micro-batches what `get_batch_samples` has weighted.
        self.model_accepts_loss_kwargs = True
        self._unfinished_step = []
        self._train_metrics = torch.zeros(())  # (number of metrics, 2) once something was counted
        self._epoch = 0
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    @staticmethod
    def _tokenizer_of(model, kwargs):
        name = model.config._name_or_path
        if not name:
            raise ValueError(
                "`processing_class` is not given, and the model was not loaded from anywhere: pass its tokenizer."
            )
        try:
            return AutoTokenizer.from_pretrained(name, **kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`processing_class` is not given, and no tokenizer could be loaded from {name!r}, where the model "
                f"comes from: pass it. ({error})"
            ) from error

    @staticmethod
    def _wrap_in_adapter(model, args, peft_config):
        if isinstance(model, PeftModel):
            raise ValueError("`peft_config` was given, but `model` already is a PeftModel: pass one or the other.")
        peft_config = complete_lora_config(model, peft_config)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()  # the frozen embedding would cut the checkpointed graph off
        return get_peft_model(model, peft_config)

    def _prepare_dataset(self, dataset, name, processing_class, args):
        """Tokenize, number the examples, and drop those without a response, saying how many."""
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise ValueError(
                f"`{name}` is a {type(dataset).__name__}: it must be a `datasets.Dataset` or IterableDataset."
            )
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"`{name}` is empty: it must hold at least one example.")
        if not any(set(columns) <= set(first) for columns in DATASET_FORMATS):
            wanted = ", or ".join(
                " and ".join(f"`{column}`" for column in sorted(format)) for format in DATASET_FORMATS
            )
            raise ValueError(f"`{name}` has the columns {sorted(first)}: it must have {wanted}.")
        settings = {
            "tokenizer": processing_class,
            "max_length": args.max_length,
            "response_length": args.response_length,
            "mask_token_id": self.mask_token_id,
            "block_causal_length": self.block_causal_length,
            "limit": self.max_position_embeddings,
            "name": name,
        }
        # Those that a data collator of one's own may want are kept if asked for.
        columns = [column for column in first if args.remove_unused_columns and column not in BATCH_COLUMNS]
        if isinstance(dataset, IterableDataset):
            if args.dataloader_drop_last and name == "train_dataset":
                raise ValueError("`dataloader_drop_last=True` is not allowed with a stream: Trainer would ignore it.")
            counts = {"seen": 0, "dropped": 0}
            return dataset.map(prepare_example, fn_kwargs=settings, remove_columns=columns).filter(
                has_response, fn_kwargs={"logits_shift": self.logits_shift, "counts": counts, "name": name}
            )
        with PartialState().main_process_first():  # the other processes find the result in the cache
            prepared = dataset.map(
                prepare_example,
                with_indices=True,
                fn_kwargs=settings,
                remove_columns=columns,
                desc=f"Tokenizing {name}",
                num_proc=args.dataset_num_proc,
            )
            kept = prepared.filter(
                has_response,
                fn_kwargs={"logits_shift": self.logits_shift},
                desc=f"Checking {name}",
                num_proc=args.dataset_num_proc,
            )
        if dropped := len(prepared) - len(kept):
            logger.warning(
                f"`{name}`: {dropped} of {len(prepared)} examples dropped, because nothing of their response lies "
                f"within `max_length={args.max_length}`."
            )
        if len(kept) == 0:
            raise ValueError(
                f"`{name}` has no example with a response within `max_length={args.max_length}` tokens: raise it."
            )
        share = padding_share(kept.select(range(min(len(kept), 1000))), processing_class.eos_token_id)
        if share > 2 / 3:
            setting = "max_length" if args.response_length is None else "response_length"
            logger.warning(
                f"`{name}`: {share:.0%} of what is learned is end-of-text behind the answers. Lower "
                f"`{setting}={getattr(args, setting)}` to learn more of the answers in the same time."
            )
        return kept

    def get_train_dataloader(self) -> DataLoader:
        dataloader = super().get_train_dataloader()
        if self.args.dataloader_drop_last and has_length(dataloader) and len(dataloader) == 0:
            size = self._train_batch_size * self.args.world_size
            raise ValueError(
                f"`dataloader_drop_last=True` is not allowed with {len(self.train_dataset)} examples in "
                f"`train_dataset`: they do not fill one batch, of {size} over all processes."
            )
        return dataloader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        is_known = eval_dataset is self.eval_dataset  # Trainer passes the one of construction on
        return super().get_eval_dataloader(eval_dataset if is_known else self._prepare_if_raw(eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset) -> DataLoader:
        return super().get_test_dataloader(self._prepare_if_raw(test_dataset, "test"))

    def _prepare_if_raw(self, dataset, kind):
        """A dataset, but not None or the name of one."""
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        return self._prepare_dataset(dataset, f"{kind}_dataset", self.processing_class, self.args)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in `Trainer`, but by shape as well as by name: no vector decays, that is no norm, bias or magnitude,
        whatever it is called (LLaDA's final norm is `ln_f`)."""
        return [name for name in super().get_decay_parameter_names(model) if plain_name(name) not in self._vectors]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`, but `resume_from_checkpoint=True` takes the last checkpoint that is complete, and one that
        was saved under FSDP goes on under DDP and on one device, and the other way round, on any number of them.

        A run goes on as it began. What decides its steps must be the same: the optimizer and its schedule, seeds,
        precision, masks, losses, lengths, the rows of `train_dataset` (of a stream, nothing is compared), the adapter
        and the weights under it, the global batch size; `max_steps` and `num_train_epochs` only where the schedule of
        the learning rate, or a mask ratio or block length that grows, depends on them. The rest may change: folders,
        what is logged, evaluated, saved and pushed and when, the number of processes and the size of micro-batches
        that make up the same global batch, checkpointing, compilation, workers, and how evaluation decodes.

        Raises:
            ValueError: for a checkpoint of a run with other settings, naming each with its old and new value; for one
                of DeepSpeed under another layout, or of another one under DeepSpeed.
        """
        if resume_from_checkpoint is True:
            # Without one, Trainer says so.
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, (str, Path)) and self._is_elsewhere(resume_from_checkpoint):
            layouts = layout_of(resume_from_checkpoint), self._layout
            if DEEPSPEED in layouts:
                raise ValueError(
                    f"`resume_from_checkpoint={str(resume_from_checkpoint)!r}` was saved under {layouts[0]}, and this "
                    f"is {layouts[1]}: what DeepSpeed saves, DeepSpeed alone goes on with. Resume it under "
                    f"{layouts[0]}, or start a new run from its weights."
                )
        if isinstance(resume_from_checkpoint, (str, Path)) and Path(resume_from_checkpoint).is_dir():
            is_first = self.is_world_process_zero()
            changed = [changed_settings(resume_from_checkpoint, self._run_settings()) if is_first else None]
            if changed := broadcast_object_list(changed)[0]:
                raise ValueError(
                    f"`resume_from_checkpoint={str(resume_from_checkpoint)!r}` is of a run with other settings: "
                    f"{changed}. Go on with those it had, or start a new run in another `output_dir`."
                )
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        # For `merge_adapter(trainer.model, ...)` and `push_model`, which have no folder to look in.
        self.accelerator.unwrap_model(self.model).training_record = training_record(self, self._hub_datasets)
        return output

    def _run_settings(self):
        batch_size = None if self.args.auto_find_batch_size else self.get_total_train_batch_size(self.args)
        return {**run_settings(self.args, self.train_dataset, batch_size), **self._model_settings}

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_settings(self._run_settings(), folder)
        super()._save_checkpoint(model, trial)

    @property
    def _layout(self):
        return DEEPSPEED if self.is_deepspeed_enabled else FSDP if self.is_fsdp_enabled else PLAIN

    def _is_elsewhere(self, checkpoint):
        return Path(checkpoint).is_dir() and layout_of(checkpoint) != self._layout

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._is_elsewhere(resume_from_checkpoint):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        if not self._is_elsewhere(self.state.best_model_checkpoint):
            return super()._load_best_model()
        load_weights(self.model, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not self._is_elsewhere(checkpoint):
            return super()._load_optimizer_and_scheduler(checkpoint)
        schedule = Path(checkpoint) / "scheduler.pt"
        if not schedule.exists():
            raise ValueError(
                f"`resume_from_checkpoint={str(checkpoint)!r}` is not allowed: it has no scheduler.pt "
                f"(`save_only_model` leaves it out)."
            )
        load_optimizer(self.model, self.optimizer.optimizer, checkpoint)
        self.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))

    def _inner_training_loop(self, *args, **kwargs):
        # Called again by `auto_find_batch_size` after it ran out of memory: what that try counted must not be logged.
        self._unfinished_step, self._train_metrics = [], torch.zeros(())
        return super()._inner_training_loop(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], int | None]:
        """The micro-batches of this process for one optimizer step, as in `Trainer`, and the number of rows that all
        processes have for it. Each batch gets `row_weight` (B,), such that the sum of weighted losses has the gradient
        of the mean over all rows of the step, however they are split: a row counts as much in a last micro-batch that
        is smaller, and not at all where it repeats another to fill the last batch of a process.

        What a stream has left at its end for less than a step goes into the first step of the next epoch; of a stream
        it is not known which rows its last batch repeats."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches - len(self._unfinished_step), device)
        batches = [*self._unfinished_step, *batches]
        if len(batches) < num_batches:
            self._unfinished_step = batches
            return [], None
        self._unfinished_step = []
        sizes = [len(batch["input_ids"]) for batch in batches]
        counts, state = sizes.copy(), self.accelerator.gradient_state
        # Batches of `batch_rebalance` are no slices of one global batch, and repeat nothing.
        if state.end_of_dataloader and state.remainder > 0 and self.args.train_sampling_strategy != "batch_rebalance":
            counts[-1] = min(max(state.remainder - self.args.process_index * sizes[-1], 0), sizes[-1])
        rows = self.accelerator.reduce(torch.tensor(sum(counts), device=device), "sum")
        for batch, size, count in zip(batches, sizes, counts, strict=True):
            is_counted = torch.arange(size, device=device) < count
            batch["row_weight"] = is_counted * (self.args.world_size / rows)  # DDP averages over the processes
        return batches, rows

    def _run_epoch(self, model, epoch, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # Of a run that had ended inside an epoch, Trainer would go on with that.
            self.control.should_training_stop = True
            return None
        self._epoch = epoch  # `state.epoch` is a float that a stream of unknown length never brings to 1
        return super()._run_epoch(model, epoch, *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*BATCH_COLUMNS, "attention_mask"]

    def draw_masks(self, inputs: dict[str, torch.Tensor], response: torch.Tensor, **randomness: Any) -> Masks:
        """The masks of a batch: its tensors, and (B, T) bool, the tokens that are learned -> `masking.Masks`, of B
        rows, or of several views of each, all first views first."""
        if self.args.block_length is None or self.block_causal_length is not None:
            return random_masks(response, self.block_causal_length, **randomness)
        return mixed_masks(response, self.args.block_length, **randomness)

    def losses_and_metrics(
        self, logits: torch.Tensor, labels: torch.Tensor, scored: torch.Tensor, masks: Masks
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """From logits (N, M, V) of the scored positions of N views: the loss of each example, (B,), and metrics, name
        -> (sum (B,), weight (B,)), whose logged value is the sum of the sums over the sum of the weights."""
        losses = masked_diffusion_losses(
            logits, labels, scored, masks.ratio, masks.span_length, self.args.loss_weighting
        )
        statistics = token_statistics(logits.detach(), self.mask_token_id)
        return losses, prediction_metrics(statistics, labels, scored)

    def _row_losses_and_metrics(self, model, inputs, epoch):
        """Loss (B,), metrics (B, number of metrics, 2) as sum and weight, and the model's output."""
        input_ids = inputs["input_ids"]
        masks = self.draw_masks(
            inputs,
            response_mask(inputs["prompt_length"], inputs["attention_mask"], self.logits_shift),
            seed=self.args.seed,
            epoch=epoch,
            example_id=inputs["example_id"],
        )
        # Only scored positions go through the head: there are never logits of whole sequences.
        # What is compiled is compiled anew for each shape: then let there be few.
        positions, is_scored = gather_positions(masks.scored, 32 if self.args.torch_compile else 8)
        views = len(masks.hidden) // len(input_ids)
        rows = input_ids.repeat(views, 1)
        shown = rows.masked_fill(masks.hidden, self.mask_token_id)
        if self.block_causal_length is None:
            attention_mask = inputs["attention_mask"].repeat(views, 1)
            outputs = model(
                input_ids=shown,
                # Without a mask, attention has faster kernels to choose from.
                attention_mask=None if attention_mask.all() else attention_mask,
                logits_to_keep=positions - self.logits_shift * is_scored,
            )
            logits = outputs.logits
        else:
            outputs = model(**self._streams(model, inputs, shown, positions)._asdict())
            logits = by_views(outputs.logits, views)
        if masks.ratio.ndim == 2:
            masks = masks._replace(ratio=masks.ratio.gather(1, positions))
        losses, metrics = self.losses_and_metrics(logits.float(), rows.gather(1, positions), is_scored, masks)
        self._metric_names = list(metrics)
        pairs = [torch.stack((total.detach().float(), weight.float()), dim=1) for total, weight in metrics.values()]
        return losses, torch.stack(pairs, dim=1), outputs

    def _streams(self, model, inputs, shown, positions):
        """What a block-causal model gets of all blocks of the rows and all their views (N, T) at once."""
        implementation = self.accelerator.unwrap_model(model).config._attn_implementation
        return block_streams(
            inputs["input_ids"], inputs["attention_mask"], shown, positions, first=int(inputs["prompt_length"].min()),
            block_length=self.block_causal_length, logits_shift=self.logits_shift,
            use_flex=shown.is_cuda and implementation in FLEX_ATTENTION,
        )  # fmt: skip

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        losses, metrics, outputs = self._row_losses_and_metrics(model, inputs, self._epoch)
        if not losses.isfinite().all():
            ids = inputs["example_id"][~losses.isfinite()].tolist()
            raise ValueError(
                f"The loss is not finite at step {self.state.global_step}, for the examples {ids}. Lower "
                f"`learning_rate={self.args.learning_rate}`, raise `warmup_steps`, or train in bfloat16 or float32 "
                f"instead of float16; and check that the model's own weights are finite."
            )
        # A batch that is not of a training step is one of its own.
        weights = inputs.get("row_weight", torch.full_like(losses, 1 / len(losses)))
        self._train_metrics = self._train_metrics.to(metrics.device) + (metrics * (weights > 0)[:, None, None]).sum(
            dim=0
        )
        loss = (weights * losses).sum()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, metrics, _ = self._row_losses_and_metrics(model, self._prepare_inputs(inputs), EVALUATION_EPOCH)
        # Over all processes, without the rows that were repeated to fill their last batches.
        rows = self.accelerator.gather_for_metrics(torch.cat((losses[:, None], metrics.flatten(1)), dim=1))
        self._evaluation_rows.append(rows.cpu())
        return losses.mean(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._evaluation_rows = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if not self._evaluation_rows:
            raise ValueError(
                f"There is no batch to evaluate: with `dataloader_drop_last={self.args.dataloader_drop_last}` and "
                f"`per_device_eval_batch_size={self.args.per_device_eval_batch_size}` the dataset is too small."
            )
        rows = torch.cat(self._evaluation_rows)
        # Into the metrics and not only into the log, so that the best checkpoint can be chosen by them.
        metrics = {"loss": rows[:, 0].mean().item(), **self._named_metrics(rows[:, 1:].sum(dim=0).view(-1, 2))}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._train_metrics.ndim:
            logs = {**logs, **self._named_metrics(self.accelerator.reduce(self._train_metrics, "sum"))}
            self._train_metrics = torch.zeros(())
        super().log(logs, *args, **kwargs)

    def _named_metrics(self, sums):
        """(number of metrics, 2) -> the values of those that anything was counted for."""
        pairs = zip(self._metric_names, sums.tolist(), strict=True)
        return {name: total / weight for name, (total, weight) in pairs if weight}

    def _save(self, output_dir=None, state_dict=None):
        card = Path(output_dir or self.args.output_dir) / "README.md"
        own = card.read_text(encoding="utf-8") if card.exists() else None
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_training_record(self, self._hub_datasets, card.parent)
            # peft writes an empty form, with the base model's path on this machine: `create_model_card` does better.
            card.unlink(missing_ok=True) if own is None else card.write_text(own, encoding="utf-8")

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card of the model, or of the adapter, into `args.output_dir`, with what is known of its training
        (see `hub_cards.model_cards`), after saving it there if that was not done. Arguments as in `Trainer`, but
        `dataset` and `dataset_tags` are both Hub ids, and `model_name` counts only without a `hub_model_id`.

        Raises:
            ValueError: for `tasks` other than "text-generation", and for `dataset_args`, which have no place in it.
        """
        if tasks not in (None, "text-generation", ["text-generation"]):
            raise ValueError(f"`tasks={tasks!r}` is not allowed: these models are for 'text-generation'.")
        if dataset_args is not None:
            raise ValueError(f"`dataset_args={dataset_args!r}` is not allowed: the card has no place for it.")
        folder = Path(self.args.output_dir)
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        name = self.hub_model_id or self.args.hub_model_id or model_name or folder.resolve().name
        datasets = list(dict.fromkeys([*as_list(dataset), *as_list(dataset_tags)])) or None
        card = model_card(
            folder, name, base_model=finetuned_from, datasets=datasets, license=license, language=language
        )
        card.data.tags = list(dict.fromkeys([*card.data.tags, *self._tag_names, *as_list(tags)]))
        card.save(folder / "README.md")

    def _push_from_checkpoint(self, checkpoint_folder):
        # Trainer copies weights and configurations to `output_dir` and pushes what is there: with remote code, the
        # record of the training and our card as well, what is pushed can be loaded.
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            files = {name: path for name, path in files_to_push(checkpoint_folder).items() if name not in OF_A_RUN}
            for name, path in files.items():
                target = Path(self.args.output_dir) / name
                target.parent.mkdir(exist_ok=True)
                shutil.copy(path, target)
            if files.keys() & {"config.json", "adapter_config.json"}:  # else it is in parts, which cannot be loaded
                self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future | None:
        """Save the model, or the adapter as it is, and push it with its card, in one commit and without pickles.
        `hub_cards.push_model` merges adapters. Arguments as in `Trainer`; `card` are those of `create_model_card`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        self.args.hub_private_repo = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)  # it looks there, too
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()
        settings: dict[str, Any] = {"private": bool(self.args.hub_private_repo), "token": token}
        settings["revision"] = revision or self.args.hub_revision
        push = partial(upload, self.args.output_dir, self.hub_model_id, commit_message=commit_message, **settings)
        return push() if blocking else HfApi(token=token).run_as_future(push)
