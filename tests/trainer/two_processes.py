"""What `test_two_processes.py` launches, for all families: training in the usual way or under FSDP2, or a sharded
model beside a whole one."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoTokenizer

from dparallel.trainer import CertaintyForcingTrainer, generate_trajectories
from tests.families import ALL_FAMILIES
from tests.golden import CHECKPOINT
from tests.trainer.test_certainty_forcing_trainer import settings
from tests.trainer.test_masked_diffusion_trainer import rows


def train(family, output_dir, tokenizer):
    """Logs of short runs with a global batch of 8: on rows that are all there, on a stream of unequal lengths, and on
    rows that the processes cannot share evenly at the end of each epoch, in one micro-batch and in two, and of a
    block-causal model."""
    world_size, curves = int(os.environ.get("WORLD_SIZE", "1")), []
    whole, ragged = Dataset.from_list(rows()), Dataset.from_list(rows(21))
    for dataset, shape, changes in (
        (whole, {}, {}),
        (whole.to_iterable_dataset(), {}, {"max_length": None, "response_length": 16}),
        (ragged, {}, {"optim": "sgd"}),
        (ragged, {}, {"optim": "sgd", "gradient_accumulation_steps": 2}),
        (ragged, {"block_causal_length": 4}, {"block_length": 4, "gradient_accumulation_steps": 2}),
    ):
        size = 8 // world_size // changes.get("gradient_accumulation_steps", 1)
        args = settings(output_dir, max_steps=6, learning_rate=1e-2, per_device_train_batch_size=size, **changes)
        model = family.small(**shape)
        trainer = CertaintyForcingTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        names = ("loss", "trajectory_loss", "certainty_loss", "mean_entropy")
        curves.append([[entry[name] for name in names] for entry in trainer.state.log_history if "grad_norm" in entry])
    return curves


def evaluate(family, output_dir, tokenizer):
    """Metrics of a model on five prompts, which two processes cannot share evenly."""
    args = settings(output_dir, eval_decoding_samples=5, eval_max_new_tokens=16, per_device_eval_batch_size=2)
    dataset = Dataset.from_list([{**row, "n": i} for i, row in enumerate(rows(5))])
    trainer = CertaintyForcingTrainer(
        family.small(), args, eval_dataset=dataset,
        processing_class=tokenizer, judge=lambda row: row["n"] % 2 == 0,
    )  # fmt: skip
    metrics = trainer.evaluate()
    names = "loss masked_accuracy mean_entropy decoding_accuracy nfe tpf".split()
    return {name: metrics[f"eval_{name}"] for name in names}


def trajectories(family, output_dir, tokenizer):
    model = family.small()
    prompts = Dataset.from_list([{"prompt": f"Sam has {i} books. "} for i in range(7)])
    settings = {"max_new_tokens": 8, "batch_size": 1, "shard_size": 2}
    return generate_trajectories(model, tokenizer, prompts, Path(output_dir) / "trajectories", **settings).to_list()


def shard(family, output_dir, tokenizer):
    """Loss, gradients and decoded tokens of a model sharded by FSDP2, block-causal or not, beside those of the whole
    model."""
    losses, differences = [], []
    for shape, changes in ({"block_causal_length": 4}, {"block_length": 4}), ({}, {}):
        whole, sharded = family.small(**shape), family.small(**shape)
        for block in sharded.get_submodule(family.blocks):
            fully_shard(block)
        fully_shard(sharded)
        trainer = CertaintyForcingTrainer(
            family.small(**shape), settings(output_dir, **changes), train_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer,
        )  # fmt: skip
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        pair = [trainer.compute_loss(model, batch) for model in (whole, sharded)]
        for loss in pair:
            loss.backward()
        losses.append([loss.item() for loss in pair])
        differences += [
            (a.grad - b.grad.full_tensor()).abs().max().item()
            for a, b in zip(whole.parameters(), sharded.parameters(), strict=True)
        ]
    # Rows of different lengths: each process makes passes until both are done.
    rank = torch.distributed.get_rank()
    ids, length = batch["input_ids"][rank : rank + 1, :5], 8 + 8 * rank
    same = torch.equal(whole.generate(ids, max_new_tokens=length), sharded.generate(ids, max_new_tokens=length))
    # As training in bfloat16 shards it, with checkpoints: what a block gets must not lose precision on the way.
    coarse, sharded = family.small().bfloat16(), family.small()
    sharded.gradient_checkpointing_enable()
    for block in sharded.get_submodule(family.blocks):
        fully_shard(block, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    fully_shard(sharded, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    ids = batch["input_ids"].repeat(1, 4)  # far positions, whose angles are large
    logits = [model.train()(ids).logits for model in (coarse, sharded)]
    logits[1].float().logsumexp(-1).mean().backward()
    return {
        "losses": losses,
        "gradients": max(differences),
        "same_tokens": same,
        "bfloat16": (logits[0] - logits[1]).abs().max().item(),
    }


def shard_adapter(family, output_dir, tokenizer):
    """What evaluation decodes with an adapter on a model that is sharded by FSDP2, beside the whole one."""
    args = settings(output_dir, eval_decoding_samples=5, eval_max_new_tokens=16)
    dataset = Dataset.from_list(rows(5))
    results = []
    for is_sharded in (False, True):
        trainer = CertaintyForcingTrainer(
            family.small(), args, eval_dataset=dataset,
            processing_class=tokenizer, peft_config=LoraConfig(r=2), judge=lambda row: "5" in row["response"],
        )  # fmt: skip
        if is_sharded:
            for block in trainer.model.get_base_model().get_submodule(family.blocks):
                fully_shard(block)
            fully_shard(trainer.model)
        batch = trainer.data_collator([{**row, "example_id": 0} for row in [trainer.eval_dataset[0]]])
        trainer.compute_loss(trainer.model, batch)
        results.append(trainer._decode(list(dataset)))
    return results


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip


def layouts(layout, family, output_dir, tokenizer):
    """Losses of six steps with and without an adapter, from the start, saved in the middle, and from the middle of the
    other layout's if that was there before."""
    if layout == "fsdp":
        os.environ.update(FSDP2)
    world_size, other, curves = int(os.environ.get("WORLD_SIZE", "1")), {"fsdp": "ddp", "ddp": "fsdp"}[layout], {}
    done = {name for name in (layout, other) if (Path(output_dir) / f"{name}-full").exists()}
    PartialState().wait_for_everyone()
    for kind, peft_config in (("full", None), ("adapter", LoraConfig(r=2))):
        folder = Path(output_dir) / f"{layout}-{kind}"
        starts = {folder: None, folder / "resumed": Path(output_dir) / f"{other}-{kind}" / "checkpoint-3"}
        if layout in done:
            del starts[folder]
        if other not in done:
            del starts[folder / "resumed"]
        for output, checkpoint in starts.items():
            args = settings(
                output, max_steps=6, learning_rate=1e-2, lr_scheduler_type="linear", save_strategy="steps",
                save_steps=3, per_device_train_batch_size=8 // world_size,
            )  # fmt: skip
            if layout == "fsdp":  # accelerate shards on GPUs alone: let it take these processes for some
                args.distributed_state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
                # and what gives weights other names there: checkpointing here, compilation there
                os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = str(kind == "full").lower()
                if kind == "adapter":
                    args.torch_compile, args.torch_compile_backend = True, "eager"
            is_read = checkpoint is not None and peft_config is None  # an adapter's base is not in its checkpoint

            def build(is_read=is_read, args=args, peft_config=peft_config):
                return CertaintyForcingTrainer(
                    family.small(seed=5 if is_read else 0), args, train_dataset=Dataset.from_list(rows()),
                    processing_class=tokenizer, peft_config=peft_config,
                )  # fmt: skip

            if layout == "fsdp" and kind == "full":
                with pytest.raises(
                    ValueError, match="is not allowed with an adapter, which would be saved without its"
                ):
                    build(peft_config=LoraConfig(r=2))
            trainer = build()
            assert trainer.is_fsdp_enabled == (layout == "fsdp")
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            losses = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
            curves[f"{kind}, {'unbroken' if checkpoint is None else 'resumed'}"] = losses
    return curves


TASKS = {
    "train": train,
    "evaluate": evaluate,
    "trajectories": trajectories,
    "shard": shard,
    "shard_adapter": shard_adapter,
    "fsdp": partial(layouts, "fsdp"),
    "ddp": partial(layouts, "ddp"),
}


def run_task(task, folder, tokenizer):
    """What a task finds, by family."""
    return {name: TASKS[task](family, str(Path(folder) / name), tokenizer) for name, family in ALL_FAMILIES.items()}


if __name__ == "__main__":
    folder, *tasks = sys.argv[1:]
    state, tokenizer = PartialState(cpu=True), AutoTokenizer.from_pretrained(CHECKPOINT)
    found = {task: run_task(task, folder, tokenizer) for task in tasks}
    (Path(folder) / f"process-{state.process_index}.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    # Not through the interpreter's shutdown: threads of the process group that are still there now and then abort it
    # ("terminate called without an active exception"), when all results are written.
    os._exit(0)
