"""Training of Learn2PD's filter: what an oracle would accept, recorded, and learned ("Learning to Parallel",
https://arxiv.org/abs/2509.25188)."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, LargeList, List
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from dparallel.modeling import DiffusionGenerationConfig, UnmaskingFilter
from dparallel.modeling.block_schedule import BlockSchedule
from dparallel.modeling.decoding_loop import DecodingLoop, Prompt
from dparallel.modeling.generation_config_diffusion import DEFAULTS
from dparallel.modeling.stopping import NEVER
from dparallel.modeling.unmasking_filter import FILLING, STATISTICS

from .diffusion_training_config import WITHOUT_EFFECT, refuse_what_has_no_effect
from .resumable_shards import map_in_shards
from .trajectories import model_digest, rows_digest

COLUMNS = ("example_id", "block", "step", *STATISTICS, "masked", "token", "labels")


def record_oracle(
    model: PreTrainedModel,
    trajectories: Dataset,
    output_dir: str | Path,
    *,
    max_new_tokens: int,
    block_length: int = 32,
    batch_size: int = 64,
    shard_size: int = 256,
) -> Dataset:
    """Decode again what a teacher answered, with an oracle that knows the answers: in each pass it accepts the
    predictions of the block that are equal to them. What a filter sees in that pass, and what it should say, becomes a
    row. Where no prediction is equal, no later pass would see anything else, and the block is filled from the answer.

    Work is spread over the processes of `accelerate launch`, and a killed run goes on where it was.

    Args:
        model (`PreTrainedModel`): the one that the filter is for, on its device.
        trajectories (`Dataset`): from `generate_trajectories`, by a slow policy: what it wrote counts as final.
        output_dir (`str` or `Path`): where shards go; one folder for one job.
        max_new_tokens (`int`), block_length (`int`): of decoding with the filter. Behind an answer stands end-of-text.
        batch_size (`int`): answers that are decoded at the same time; rows do not depend on it, but for rounding.
        shard_size (`int`): answers per shard.

    Returns:
        `Dataset`, one row for each pass over a block of each answer: `example_id`; `block` and `step`, both from 0;
        `confidence`, `entropy`, `margin`, `masked`, `token` and `labels` (1: equal to the answer), lists of
        `block_length`, filled up where a last block is shorter.

    Raises:
        ValueError: before any decoding, if an answer is longer than `max_new_tokens`, or if `output_dir` holds rows
            that were made with other settings.
    """
    missing = {"example_id", "input_ids", "prompt_length"} - set(trajectories.column_names)
    if missing:
        raise ValueError(f"`trajectories` lacks the columns {sorted(missing)}: it must be generate_trajectories' own.")
    longest = max(
        len(ids) - start for ids, start in zip(trajectories["input_ids"], trajectories["prompt_length"], strict=True)
    )
    if longest > max_new_tokens:
        raise ValueError(f"`max_new_tokens={max_new_tokens}` is not allowed: an answer has {longest} tokens.")
    model.eval()

    def record_shard(number, shard):
        return _decode_with_oracle(model, shard[:], max_new_tokens, block_length, batch_size)

    trajectories = trajectories.select_columns(["example_id", "input_ids", "prompt_length"])
    job: dict[str, Any] = {"model": model_digest(model), "trajectories": rows_digest(trajectories)}
    job |= {"max_new_tokens": max_new_tokens, "block_length": block_length}
    return map_in_shards(record_shard, trajectories, output_dir, job, shard_size, desc="Asking the oracle")


@torch.no_grad()
def _decode_with_oracle(model, rows, max_new_tokens, block_length, batch_size):
    """The records of these answers, by the loop that decodes, with an oracle in the place of the policy."""
    config = DiffusionGenerationConfig(
        **{**DEFAULTS, "block_length": block_length}, mask_token_id=model.config.mask_token_id
    )
    oracle = _Oracle(model, rows, max_new_tokens, block_length)
    schedule = BlockSchedule(
        block_length=block_length, unmasking=config.unmasking, logits_shift=model.logits_shift, seed=0
    )
    prompts = [Prompt(i, ids, max_new_tokens) for i, ids in enumerate(oracle.prompts)]
    loop = DecodingLoop(
        model, config, schedule, slots=min(batch_size, len(prompts)), seed=0, device=model.device, stop=oracle.stop,
        width=max(map(len, oracle.prompts)) + max_new_tokens, choose=oracle.choose,
    )  # fmt: skip
    for _ in loop.run(prompts):
        pass
    return sorted(oracle.records, key=lambda row: (row["example_id"], row["block"], row["step"]))


class _Oracle:
    """Knows the answers to `rows`, and notes what it sees."""

    def __init__(self, model, rows, max_new_tokens, block_length):
        pairs = list(zip(rows["input_ids"], rows["prompt_length"], strict=True))
        self.prompts, answers = [ids[:start] for ids, start in pairs], [ids[start:] for ids, start in pairs]
        eos, self.block_length = model.config.eos_token_id, block_length
        eos = eos[0] if isinstance(eos, (list, tuple)) else eos
        filled = [ids + [eos] * (max_new_tokens - len(ids)) for ids in answers]
        self.answers = torch.tensor(filled, device=model.device)
        self.starts = torch.tensor([len(ids) for ids in self.prompts], device=model.device)
        self.lengths = np.array([len(ids) for ids in answers])
        self.example_ids, self.records, self.steps = rows["example_id"], [], Counter()

    def stop(self, canvas, rows, slots):
        """A row ends with the block that holds the last token of its answer."""
        ends = rows.prompt_length[slots] + self.lengths[rows.request[slots]]
        return np.where(ends <= rows.stop[slots], ends, NEVER)

    def choose(self, plan, columns, masked, statistics):
        """Accept the predictions that are equal to the answer; where none is, fill the block from it."""
        offsets, exists = columns - self.starts[plan.request][:, None], columns < plan.stop[:, None]
        answer = self.answers[plan.request[:, None], offsets.clamp(max=self.answers.shape[1] - 1)]
        is_equal = statistics.token == answer
        self._record(plan, offsets, exists, masked, statistics, is_equal)
        accepted = masked & is_equal
        return statistics._replace(token=answer), accepted | (masked & ~accepted.any(dim=1, keepdim=True))

    def _record(self, plan, offsets, exists, masked, statistics, is_equal):
        filling, missing = FILLING | {"labels": 1}, self.block_length - masked.shape[1]
        columns = {name: getattr(statistics, name) for name in (*STATISTICS, "token")}
        columns |= {"masked": masked.long(), "labels": is_equal.long()}
        for name, column in columns.items():
            column = column.masked_fill(~exists, filling.get(name, 0))
            columns[name] = torch.nn.functional.pad(column, (0, missing), value=filling.get(name, 0)).tolist()
        blocks = (offsets[:, 0] // self.block_length).tolist()
        for i, (request, block) in enumerate(zip(plan.request.tolist(), blocks, strict=True)):
            row = {"example_id": self.example_ids[request], "block": block, "step": self.steps[request, block]}
            self.records.append(row | {name: column[i] for name, column in columns.items()})
            self.steps[request, block] += 1


def oracle_passes(records: Dataset) -> float:
    """Mean number of passes that the oracle needs for an answer: a bound for filters, but for the passes that they
    save by stopping at an end-of-text, before what is behind it in its block is decided."""
    return len(records) / len(set(records["example_id"]))


def split_by_prompt(records: Dataset, eval_share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Rows for training and for evaluation, such that all passes of an answer are on one side."""
    examples = np.unique(records["example_id"])
    count = round(eval_share * len(examples))
    if not 0 < count < len(examples):
        raise ValueError(f"`eval_share={eval_share!r}` of {len(examples)} answers leaves one side empty.")
    chosen = np.random.default_rng(seed).permutation(examples)[:count]
    is_chosen = np.isin(records["example_id"], chosen)
    return records.select(np.flatnonzero(~is_chosen)), records.select(np.flatnonzero(is_chosen))


@dataclass
class FilterConfig(TrainingArguments):
    """`TrainingArguments` with the defaults of a small network: learning rate 3e-3 as published, batches of 1,024
    passes, 30 epochs, of which the one with the lowest held-out loss is kept.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    eval_share: float = field(
        default=0.1, metadata={"help": "Share of the answers that are held out, if no `eval_dataset` is given."}
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    num_train_epochs: float = field(default=30, metadata={"help": "Times that each row is seen."})
    per_device_train_batch_size: int = field(default=1024, metadata={"help": "Passes per batch."})
    per_device_eval_batch_size: int = field(default=4096, metadata={"help": "Passes per batch of evaluation."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="best", metadata={"help": "When to save."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints that are kept."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best epoch, not the last."})
    metric_for_best_model: str | None = field(default="eval_loss", metadata={"help": "What best means."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluate the loss alone."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows hold what filters read, and no more."})
    disable_tqdm: bool | None = field(
        default=True, metadata={"help": "Print nothing. False: a progress bar, and each epoch's evaluation."}
    )

    def __post_init__(self):
        refuse_what_has_no_effect(self, {"label_smoothing_factor": WITHOUT_EFFECT["label_smoothing_factor"]})
        if not 0 < self.eval_share < 1:
            raise ValueError(f"`eval_share={self.eval_share!r}` is not allowed: it must be between 0 and 1.")
        super().__post_init__()


class _Passes(torch.utils.data.Dataset):
    """Rows as tensors, which a batch is a slice of: taking rows apart and putting them together again would take
    longer than the network does."""

    def __init__(self, records):
        names = [name for name in COLUMNS if isinstance(records.features[name], (List, LargeList))]
        self.columns = {name: torch.from_numpy(np.stack(records.with_format("numpy")[name][:])) for name in names}

    def __len__(self):
        return len(self.columns["labels"])

    def __getitems__(self, rows):
        return {name: column[rows] for name, column in self.columns.items()}

    @staticmethod
    def collate(batch):
        return batch


class FilterTrainer(Trainer):
    """Trains an `UnmaskingFilter` on the rows of `record_oracle`.

    Args:
        model (`UnmaskingFilter`): in float32.
        args (`FilterConfig`): settings.
        train_dataset (`Dataset`): rows. Without an `eval_dataset`, a share of the *answers* is held out: passes of one
            answer are alike, and the published split, which shuffles passes, has them on both sides.
        eval_dataset (`Dataset`, *optional*): rows of other answers.

    Raises:
        ValueError: for rows that the filter cannot read.
    """

    def __init__(
        self,
        model: UnmaskingFilter,
        args: FilterConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        missing = set(COLUMNS) - set(train_dataset.column_names)
        if missing:
            raise ValueError(f"`train_dataset` lacks the columns {sorted(missing)}: it must be record_oracle's own.")
        length = len(train_dataset[0]["confidence"])
        if length != model.config.block_length:
            raise ValueError(
                f"`train_dataset` holds blocks of {length} tokens, but `block_length={model.config.block_length}`."
            )
        if eval_dataset is None:
            train_dataset, eval_dataset = split_by_prompt(train_dataset, args.eval_share, args.seed)
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Passes(train_dataset),
            eval_dataset=_Passes(eval_dataset),
            data_collator=_Passes.collate,
            **kwargs,
        )
        self.remove_callback(PrinterCallback)  # which Trainer has where there is no progress bar


def acceptance_rates(accepts_by: UnmaskingFilter | str, records: Dataset, thresholds: Iterable[float]) -> list[dict]:
    """How often a filter, or a threshold on a statistic ("confidence", "margin"), errs on masked positions:
    `false_accept`, the share of the predictions that are not final which it accepts, and `false_reject`, the share of
    the final ones which it does not, for each threshold."""
    device = accepts_by.eval().device if isinstance(accepts_by, UnmaskingFilter) else torch.device("cpu")
    probability, label = [], []
    for batch in records.with_format("torch", device=str(device)).iter(8192):
        masked = batch["masked"].bool()
        if isinstance(accepts_by, UnmaskingFilter):
            with torch.no_grad():
                seen = {name: batch[name] for name in (*STATISTICS, "masked", "token")}
                scores = accepts_by(**seen)["logits"].sigmoid()
        else:
            scores = batch[accepts_by]
        probability.append(scores[masked])
        label.append(batch["labels"][masked].bool())
    probability, label = torch.cat(probability), torch.cat(label)
    rates = []
    for threshold in thresholds:
        accepted = probability > threshold
        rates.append(
            {
                "threshold": float(threshold),
                "false_accept": (accepted & ~label).sum().item() / max((~label).sum().item(), 1),
                "false_reject": (~accepted & label).sum().item() / max(label.sum().item(), 1),
            }
        )
    return rates
