"""Certainty-forcing distillation: learn a teacher's answers while right predictions are pushed towards certainty."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from dparallel.modeling import POLICIES, token_statistics

from .certainty_forcing_config import CertaintyForcingConfig
from .losses import certainty_forcing_losses, prediction_metrics
from .masked_diffusion_trainer import MaskedDiffusionTrainer
from .masking import EVALUATION_EPOCH, Masks, complementary_masks
from .tokenization import tokenize_prompt
from .trajectories import decode_prompts

NO_STEPS = "`unmasking_step`, which `masking='trajectory'` needs: `generate_trajectories` writes that column."


def _parts(dataset):
    """A dataset, none, or several by name, as a list."""
    return [] if dataset is None else list(dataset.values()) if isinstance(dataset, dict) else [dataset]


class CertaintyForcingTrainer(MaskedDiffusionTrainer):
    """dParallel's distillation ("dParallel: Learnable Parallel Decoding for dLLMs", https://arxiv.org/abs/2509.26488).

    Of each example a span is drawn, a block of the response or all of it, and seen twice, with complementary tokens
    hidden; of a block-causal model, all blocks are seen at once. The loss of an example is the sum over both views of
    `trajectory_weight` times the mean cross-entropy with the teacher's answer, plus `certainty_weight` times the mean
    entropy of those predictions that are right already.

    Args:
        judge (`Callable[[dict], bool]`, *optional*): is the answer right? It gets a row of the evaluation dataset with
            the decoded text as `response`. Used with `eval_decoding_samples`.
        model, args, train_dataset, eval_dataset, ...: as for `MaskedDiffusionTrainer`; `args` is a
            `CertaintyForcingConfig`. `train_dataset` usually comes from `generate_trajectories`, wrong answers left
            out; any prompts with answers will do (rows with `unmasking_step` for `masking="trajectory"`).

    Logged besides the loss: `trajectory_loss` and `certainty_loss`, each the sum over both views, before weighting;
    `masked_accuracy`, `mean_confidence` and `mean_entropy` (nats) of the scored tokens; `unmasked_share`, the share of
    them that decoding with `unmasking` and `threshold` would write in this pass. At evaluation the same with the
    prefix `eval_`, and with `eval_decoding_samples` what decoding takes: `eval_nfe` (passes per prompt), `eval_tpf`
    (tokens up to the end-of-text, over the passes), `eval_decoding_accuracy` (with a `judge`). All of them can be
    `metric_for_best_model`; the published recipe over-trains, so choose the checkpoint by them.
    """

    _name = "certainty-forcing distillation"
    _paper = {"title": "dParallel: Learnable Parallel Decoding for dLLMs", "id": "2509.26488"}
    _tag_names = ["dparallel", "diffusion", "dllm", "certainty-forcing"]
    _config_class = CertaintyForcingConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: CertaintyForcingConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
        judge: Callable[[dict], bool] | None = None,
    ):
        if args is None:
            args = CertaintyForcingConfig(output_dir="certainty-forcing")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self.judge = judge
        self._decoding_rows = []
        self._raw_eval_dataset = eval_dataset
        args, best = self.args, self.args.metric_for_best_model or ""
        if best.endswith("decoding_accuracy") and judge is None:
            raise ValueError(f"`metric_for_best_model={best!r}` needs a `judge`.")
        if best.endswith(("decoding_accuracy", "nfe", "tpf")) and not args.eval_decoding_samples:
            raise ValueError(f"`metric_for_best_model={best!r}` needs `eval_decoding_samples` of at least 1.")
        for name, dataset in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            for part in _parts(dataset):
                if args.masking == "trajectory" and "unmasking_step" not in next(iter(part)):
                    raise ValueError(f"`{name}` has no {NO_STEPS}")
        for part in _parts(eval_dataset):
            self._require_prompts(part)

    def _save(self, output_dir=None, state_dict=None):
        # What is saved decodes as it was trained to, and not as its teacher does.
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.generation_config.update(steps=None, **self.args.decoding)
        super()._save(output_dir, state_dict)

    def draw_masks(self, inputs: dict[str, torch.Tensor], response: torch.Tensor, **randomness: Any) -> Masks:
        args = self.args
        if args.masking == "trajectory" and "unmasking_step" not in inputs:
            raise ValueError(f"The batch has no {NO_STEPS}")
        is_evaluation = randomness["epoch"] == EVALUATION_EPOCH
        progress = 1.0 if is_evaluation else self.state.global_step / max(self.state.max_steps, 1)

        def grown(start, stop):
            return stop if start is None else start + progress * (stop - start)

        ratio = grown(args.mask_ratio_start, args.mask_ratio)
        has_one_span = args.masking == "response" or self.block_causal_length is not None
        masks = complementary_masks(
            response,
            None if has_one_span else round(grown(args.block_length_start, args.block_length)),
            (ratio if args.mask_ratio_low is None else args.mask_ratio_low, ratio),
            inputs["unmasking_step"] if args.masking == "trajectory" else None,
            self.block_causal_length,
            **randomness,
        )
        return masks if args.complementary else type(masks)(*(tensor[: len(response)] for tensor in masks))

    def losses_and_metrics(
        self, logits: torch.Tensor, labels: torch.Tensor, scored: torch.Tensor, masks: Masks
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        args = self.args

        def over_views(rows):
            return rows.view(2 if args.complementary else 1, -1).sum(dim=0)

        trajectory, certainty = map(
            over_views, certainty_forcing_losses(logits, labels, scored, args.certainty_temperature)
        )
        statistics = token_statistics(logits.detach(), self.mask_token_id)
        unmasked = POLICIES[args.unmasking].select(statistics, scored, threshold=args.threshold)
        of_tokens = prediction_metrics(statistics, labels, scored)
        of_tokens["unmasked_share"] = (unmasked.sum(dim=1), scored.sum(dim=1))
        ones = trajectory.new_ones(trajectory.shape)
        metrics = {"trajectory_loss": (trajectory, ones), "certainty_loss": (certainty, ones)}
        metrics |= {name: tuple(map(over_views, pair)) for name, pair in of_tokens.items()}
        return args.trajectory_weight * trajectory + args.certainty_weight * certainty, metrics

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        raw = eval_dataset
        if eval_dataset is None or eval_dataset is self.eval_dataset:
            raw = self._raw_eval_dataset
        elif isinstance(eval_dataset, str):
            raw = self._raw_eval_dataset[eval_dataset]  # type: ignore[index]
        self._choose_decoding_rows(raw)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset) -> DataLoader:
        self._choose_decoding_rows(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _choose_decoding_rows(self, raw):
        """From the dataset as it was given: the prepared one has lost the columns that the judge may want."""
        if raw is not None:  # else Trainer says what is missing
            self._require_prompts(raw)
            self._decoding_rows = list(islice(raw, self.args.eval_decoding_samples))

    def _require_prompts(self, dataset):
        """If it is to be decoded."""
        count = self.args.eval_decoding_samples
        if count and not {"prompt", "messages"} & (columns := set(next(iter(dataset)))):
            raise ValueError(
                f"`eval_decoding_samples={count}` needs the column `prompt` or `messages`, but the evaluation dataset "
                f"has {sorted(columns)}."
            )

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows, self._decoding_rows = self._decoding_rows, []
        if rows:
            decoding = self._decode(rows)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in decoding.items()})
        return output

    def _decode(self, rows):
        """Decode each process's share of `rows`, and count over all."""
        world, mine = self.args.world_size, rows[self.args.process_index :: self.args.world_size]
        mine += rows[: -(-len(rows) // world) - len(mine)]  # every process has as many passes to take part in
        settings = {"max_new_tokens": self.args.eval_max_new_tokens, **self.args.decoding}
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        is_sharded = isinstance(model, FSDPModule)
        if is_sharded:
            # An adapter's generate() calls the model inside, past the hook that would gather the outermost weights;
            # and processes need as many passes, as each takes part in gathering the others'.
            model.unshard()
            settings["synced_gpus"] = True
        prompts = [tokenize_prompt(row, self.processing_class) for row in mine]
        decoded = decode_prompts(
            model, self.processing_class, prompts, batch_size=self.args.eval_decoding_batch_size, **settings
        )
        if is_sharded:
            model.reshard()
        counted = len(rows[self.args.process_index :: world])
        passes = [row["num_forward_passes"] for row in decoded[:counted]]
        tokens = [len(row["unmasking_step"]) for row in decoded[:counted]]
        right = []
        if self.judge is not None:
            pairs = zip(mine[:counted], decoded, strict=False)
            right = [bool(self.judge({**row, "response": answer["response"]})) for row, answer in pairs]
        passes, tokens, right = gather_object(passes), gather_object(tokens), gather_object(right)
        metrics = {"nfe": sum(passes) / len(passes), "tpf": sum(tokens) / sum(passes)}
        if right:
            metrics["decoding_accuracy"] = sum(right) / len(right)
        return metrics
