"""Train the example model of word problems from scratch: a LLaDA of 5 million parameters.

With the defaults this takes nine minutes on one H200. Any field of `MaskedDiffusionConfig` is a flag. With
`--block_causal true`, attention is causal between the blocks that the model decodes, answers are filled up to the end
of a block instead of to the longest answer's length, and `--max_steps` is 3800, which take the same time. The test
problems are not used here; `examples/quickstart.py --model runs/word_problems --problems 5000` measures on them. The
second command is a try on a CPU.

    python examples/word_problems/train.py --output_dir runs/word_problems
    python examples/word_problems/train.py --num_train_problems 2000 --num_validation_problems 4 --max_steps 20 \\
        --per_device_train_batch_size 32 --output_dir runs/try
"""

import tempfile
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from problems import generate_problems, to_conversation
from solving import ANSWER_LENGTH, evaluate
from tokenizer import build_tokenizer
from transformers import HfArgumentParser, set_seed

from dparallel.hub_cards.command_line import help_of
from dparallel.modeling import DiffusionGenerationConfig, LLaDAConfig, LLaDAModelLM
from dparallel.trainer import MaskedDiffusionConfig, MaskedDiffusionTrainer


@dataclass
class Arguments:
    num_train_problems: int = field(default=1_000_000, metadata={"help": "Number of generated training problems."})
    num_validation_problems: int = field(default=1000, metadata={"help": "Number of validation problems."})
    block_causal: bool = field(
        default=False, metadata={"help": "Let attention be causal between blocks of `block_length` tokens."}
    )


DEFAULTS = {  # of this model, instead of the trainer's own
    "output_dir": "runs/word_problems", "max_length": 256, "response_length": ANSWER_LENGTH, "block_length": 32,
    "loss_weighting": "token", "max_steps": 10_000, "per_device_train_batch_size": 768, "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine", "warmup_steps": 200, "weight_decay": 0.01, "adam_beta2": 0.98,
    "bf16": torch.cuda.is_available(), "logging_steps": 100, "pad_to_multiple_of": 32,
    "torch_compile": torch.cuda.is_available(), "save_strategy": "no", "report_to": "none",
    "dataloader_num_workers": 8, "dataloader_drop_last": True,
}  # fmt: skip

BLOCK_CAUSAL_DEFAULTS = {"response_length": None, "max_steps": 3800}


def generated_rows(to_row, split, seeds, count):
    for seed in seeds:
        for problem in generate_problems(split, count, seed):
            yield to_row(problem)


def generated_dataset(to_row, split, count, seed, num_shards, cache_dir):
    """`to_row` of at least `count` problems. Each shard has its own seed, so that processes share the work."""
    return Dataset.from_generator(
        generated_rows,
        gen_kwargs={
            "to_row": to_row,
            "split": split,
            "seeds": [seed * 1000 + shard for shard in range(num_shards)],
            "count": -(-count // num_shards),
        },
        num_proc=num_shards,
        cache_dir=cache_dir,
    )


def main():
    parser = HfArgumentParser((Arguments, MaskedDiffusionConfig), **help_of(__doc__))
    parser.set_defaults(**DEFAULTS)
    arguments, config = parser.parse_args_into_dataclasses()
    set_seed(config.seed)
    if arguments.block_causal:
        for name, value in BLOCK_CAUSAL_DEFAULTS.items():
            if getattr(config, name) == DEFAULTS[name]:
                setattr(config, name, value)
    tokenizer = build_tokenizer()
    model = LLaDAModelLM(
        LLaDAConfig(
            d_model=256,
            n_layers=6,
            n_heads=8,
            mlp_hidden_size=768,
            vocab_size=-(-len(tokenizer) // 8) * 8,
            max_sequence_length=2048,
            rope_theta=10000.0,
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            block_causal_length=config.block_length if arguments.block_causal else None,
        )
    )
    model.generation_config = DiffusionGenerationConfig(
        do_sample=False,
        max_new_tokens=ANSWER_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    shards = config.dataset_num_proc or 1
    with tempfile.TemporaryDirectory() as cache:
        trainer = MaskedDiffusionTrainer(
            model=model,
            args=config,
            train_dataset=generated_dataset(
                to_conversation, "train", arguments.num_train_problems, config.seed, shards, cache
            ),
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if trainer.accelerator.is_main_process:
        problems = list(generate_problems("validation", arguments.num_validation_problems, config.seed * 1000))
        model.eval().to(torch.float32)
        result = evaluate(model, tokenizer, problems, "validation", 256, unmasking="confidence", steps=ANSWER_LENGTH)
        print(f"validation accuracy at one token a step: {result.accuracy:.3f}")
        # Half the bytes; the weights are trained under bfloat16 anyway.
        model.to(torch.bfloat16).save_pretrained(config.output_dir)
        tokenizer.save_pretrained(config.output_dir)
        command = f"python examples/quickstart.py --model {config.output_dir} --problems 5000"
        print(f"In {config.output_dir}: the model. Next, to measure it on the test problems: {command}")


if __name__ == "__main__":
    main()
