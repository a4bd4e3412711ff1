"""How long a distillation step takes, and how much memory: `CertaintyForcingTrainer` beside a plain step and beside
what the hardware allows.

A step is forward, backward and optimizer for LoRA of rank 128 on q, k, v and up, as published, sequences of 384
tokens, both complementary views. The plain step does it as research code does: one view after the other, logits of the
whole sequence, losses on those. "All blocks" is the same model made block-causal, which learns every block of a
sequence in one step instead of one of them. Each row is a process of its own, so that memory is its own. Prints a
table and writes JSON.

The first command needs a GPU of 80 GB, for LLaDA-8B's shape with random weights; the second, with the small example
model `examples/word_problems/checkpoint`, takes two minutes on a CPU.

    python examples/benchmarks/training.py
    python examples/benchmarks/training.py --shape example
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from decoding import add_shape_argument, load, measure_ceilings
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, TrainerCallback

from dparallel.hub_cards import here_and_now
from dparallel.hub_cards.command_line import CommandParser
from dparallel.trainer import CertaintyForcingConfig, CertaintyForcingTrainer
from dparallel.trainer.lora import complete_lora_config
from dparallel.trainer.masking import complementary_masks

PROMPT_LENGTH, BLOCK_LENGTH = 128, 32
KINDS = (
    "plain", "trainer", "trainer, blocks compiled", "trainer, model captured", "trainer, checkpointing",
    "trainer, blocks compiled, checkpointing", "trainer, all blocks", "trainer, all blocks, blocks compiled",
)  # fmt: skip


def adapter(rank):
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="published")


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def plain_steps(model, rows, arguments):
    """Seconds of each step."""
    model = get_peft_model(model, complete_lora_config(model, adapter(arguments.rank))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.01)
    mask_token_id, times = model.config.mask_token_id, []
    response = (torch.arange(arguments.length) >= PROMPT_LENGTH).expand(arguments.micro_batch, -1)
    for step in range(arguments.warm_up + arguments.steps):
        synchronize()
        start = time.perf_counter()
        ids = rows[step * arguments.micro_batch :][: arguments.micro_batch].to(model.device)
        example_ids = torch.arange(arguments.micro_batch)
        views = complementary_masks(response, BLOCK_LENGTH, (0.5, 0.5), seed=0, epoch=step, example_id=example_ids)
        total = 0.0
        for hidden, scored in zip(views.hidden.chunk(2), views.scored.chunk(2), strict=True):
            hidden, scored = hidden.to(ids.device), scored.to(ids.device)
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
                logits = model(ids.masked_fill(hidden, mask_token_id)).logits
            probs = (logits / 0.5).softmax(dim=-1)
            entropy = -(probs * (probs + 1e-12).log()).sum(dim=-1)
            right = scored & (logits.argmax(dim=-1) == ids)
            total = total + F.cross_entropy(logits[scored].float(), ids[scored])
            total = total + 2.0 * (entropy[right].mean() if right.any() else 0.0)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


class Stopwatch(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_begin(self, *args, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        synchronize()
        self.times.append(time.perf_counter() - self.start)


def random_rows(config, count, length):
    """Token ids (count, length), the same in each process."""
    torch.manual_seed(0)
    return torch.randint(5, config.vocab_size // 2, (count, length))


def build_trainer(model, rows, output_dir, micro_batch, peft_config, prompt_length=PROMPT_LENGTH, **settings):
    """A trainer with the published losses for token ids (N, T), and its stopwatch."""
    is_gpu, stopwatch = torch.cuda.is_available(), Stopwatch()
    config = CertaintyForcingConfig(
        output_dir=output_dir,
        max_length=rows.shape[1],
        masking="block",
        certainty_weight=2.0,
        per_device_train_batch_size=micro_batch,
        use_cpu=not is_gpu,
        report_to="none",
        disable_tqdm=True,
        **{"bf16": is_gpu, **settings},
    )
    examples = [{"input_ids": row, "prompt_length": prompt_length} for row in rows.tolist()]
    trainer = CertaintyForcingTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(examples),
        processing_class=any_tokenizer(model.config),
        callbacks=[stopwatch],
        peft_config=peft_config,
    )
    return trainer, stopwatch


def trainer_steps(model, rows, arguments, output_dir):
    """Seconds of each step."""
    words = ("blocks compiled", "captured", "checkpointing")
    blocks, captured, checkpointing = (word in arguments.kind for word in words)
    if blocks:
        os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"  # one block, not 32
    trainer, stopwatch = build_trainer(
        model,
        rows,
        output_dir,
        arguments.micro_batch,
        adapter(arguments.rank),
        max_steps=arguments.warm_up + arguments.steps,
        gradient_checkpointing=checkpointing,
        torch_compile=blocks or captured,
        torch_compile_mode="reduce-overhead" if captured else None,  # forward and backward as CUDA graphs
        save_strategy="no",
    )
    trainer.train()
    return stopwatch.times


def floor(model, ceilings, arguments):
    """Seconds that the products of a step take at least at the measured rate: forward, and backward to the inputs but
    not to frozen weights; the head on the scored positions alone. Nothing of the adapter counts."""
    config = model.config
    head = model.get_output_embeddings().weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - head
    weights -= 0 if config.weight_tying else model.get_input_embeddings().weight.numel()
    tokens = 2 * arguments.micro_batch * arguments.length
    if config.block_causal_length is not None:  # the sequence once, and of each view what is learned
        tokens = arguments.micro_batch * (3 * arguments.length - 2 * PROMPT_LENGTH)
    forward = 2 * tokens * weights + 4 * tokens * arguments.length * config.d_model * config.n_layers
    forward += 2 * labelled_tokens(arguments) * head
    return 2 * forward / ceilings["operations_per_second"]


def labelled_tokens(arguments):
    """How many tokens a step learns, in one of the two views each."""
    learned = arguments.length - PROMPT_LENGTH if "all blocks" in arguments.kind else BLOCK_LENGTH
    return arguments.micro_batch * learned


def measure(arguments):
    """One row of the table, as JSON on the last line of the output."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ceilings = measure_ceilings(device)
    model = load(arguments.shape, device)
    model.config.use_cache = False
    model.config.block_causal_length = BLOCK_LENGTH if "all blocks" in arguments.kind else None
    count = arguments.micro_batch * (arguments.warm_up + arguments.steps)
    rows = random_rows(model.config, count, arguments.length)
    row = {"kind": arguments.kind, "micro_batch": arguments.micro_batch, "floor": floor(model, ceilings, arguments)}
    row["labelled_tokens"] = labelled_tokens(arguments)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        if arguments.kind == "plain":
            times = plain_steps(model, rows, arguments)
        else:
            with tempfile.TemporaryDirectory() as folder:
                times = trainer_steps(model, rows, arguments, folder)
        row |= {"seconds": statistics.median(times[arguments.warm_up :]), "first": times[0]}
    except torch.OutOfMemoryError:
        row |= {"seconds": None, "first": None}
    row["gibibytes"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    print(json.dumps({"ceilings": ceilings, "row": row}))


def any_tokenizer(config):
    """One that knows the end-of-text: the examples are ids already."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<eos>": config.eos_token_id, "<other>": 1 + config.eos_token_id}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<other>")),
        eos_token="<eos>",
        pad_token="<eos>",
    )


def main():
    parser = CommandParser(__doc__)
    add_shape_argument(parser)
    parser.add_argument(
        "--micro_batches",
        type=int,
        nargs="+",
        help="numbers of sequences in a micro-batch (default: 1 2 4 8, with --shape example 2)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=list(KINDS),
        choices=KINDS,
        metavar="KIND",
        help="kinds of steps, by their names in the table (default: all)",
    )
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: 384, with --shape example 192)")
    parser.add_argument("--rank", type=int, default=128, help="rank of the LoRA")
    parser.add_argument("--steps", type=int, default=5, help="number of steps that are timed")
    parser.add_argument("--warm_up", type=int, default=3, help="number of steps before those, which are not timed")
    parser.add_argument("--output", type=Path, default=Path("training.json"), help="file for every row of the table")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--micro_batch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    is_example = arguments.shape == "example"
    arguments.length = arguments.length or (192 if is_example else 384)
    if arguments.kind:
        return measure(arguments)
    results = here_and_now() | {"threads": torch.get_num_threads(), "shape": arguments.shape}
    results |= {"length": arguments.length, "rows": []}
    print(f"{results['hardware']}, {results['threads']} threads, {results['versions']}, ", end="")
    print(f"{results['date']}: {arguments.shape}, LoRA of rank {arguments.rank}, {arguments.length} tokens\n")
    print("| micro-batch | step | ms | floor | times the plain step | labelled tokens/s | GiB |")
    print("| --- " * 7 + "|", flush=True)
    for micro_batch in arguments.micro_batches or ([2] if is_example else [1, 2, 4, 8]):
        plain = None
        for kind in arguments.kinds:
            flags = {"kind": kind, "micro_batch": micro_batch}
            flags |= {name: getattr(arguments, name) for name in ("shape", "length", "rank", "steps", "warm_up")}
            command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in flags.items())]
            process = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
            result = json.loads(process.stdout.splitlines()[-1])
            row, results["ceilings"] = result["row"], result["ceilings"]
            results["rows"].append(row)
            plain = row["seconds"] if kind == "plain" else plain
            taken, memory = row["seconds"], row["gibibytes"]
            print(
                f"| {micro_batch} | {kind} | {'out of memory' if taken is None else f'{1000 * taken:.0f}'} | "
                f"{1000 * row['floor']:.0f} | {f'{plain / taken:.1f}' if plain and taken else ''} | "
                f"{'' if taken is None else round(row['labelled_tokens'] / taken)} | "
                f"{'' if memory is None else f'{memory:.1f}'} |",
                flush=True,
            )
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"In {arguments.output}: every row. Next, for several GPUs: python examples/benchmarks/scale_out.py")


if __name__ == "__main__":
    main()
