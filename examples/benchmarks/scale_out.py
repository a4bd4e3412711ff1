"""How distillation, trajectories and evaluation scale over the GPUs of one machine, with LLaDA-8B's shape and random
weights; and that a checkpoint goes on under another layout.

Each row is a launch of its own, with a file of `examples/accelerate_configs`:

- training: a `CertaintyForcingTrainer` step, of LoRA (rank 128 on q, k, v and up) or of all weights (checkpointed),
  with the same global batch on one GPU and on all of them: tokens of the examples per second (each is in two views),
  peak memory of the fullest GPU, efficiency (tokens per second of each GPU, over that of one alone) and how far the
  trajectory losses are from those of one GPU, or of the first layout where one GPU is too small (the certainty loss
  counts right predictions, of which random weights have few: one that rounding turns right or wrong is a leap);
- decoding: answers per second of `generate_trajectories` and of `evaluate_task`, and whether they equal those of one
  process;
- checkpoints: the example model in float32, saved halfway under one layout, resumed under another, and merged: how
  far losses and weights are from those of the run that saved, which went on to its end; and, to compare, how far the
  losses of the two layouts are from each other anyway.

Prints tables and writes JSON; the exit status is 1 if a launch failed.

The first command takes all GPUs of the machine, of 80 GB; the second runs on a CPU, with the small example model
`examples/word_problems/checkpoint`.

    python examples/benchmarks/scale_out.py
    python examples/benchmarks/scale_out.py --shape example --processes 2
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
from accelerate import PartialState
from decoding import EXAMPLE, add_shape_argument, load
from safetensors.torch import load_file
from training import PROMPT_LENGTH, adapter, build_trainer, random_rows
from transformers import AutoTokenizer

from dparallel.evaluation import evaluate_task
from dparallel.evaluation.command_line import find_task
from dparallel.hub_cards import here_and_now, merge_adapter
from dparallel.hub_cards.command_line import CommandParser
from dparallel.trainer import generate_trajectories

CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
TASK = f"{EXAMPLE.parent / 'evaluate_word_problems.py'}:WORD_PROBLEMS"
PARTS = ("training", "decoding", "checkpoints")
ALONE = "single_gpu"
LAYOUTS = {"LoRA": (ALONE, "ddp", "fsdp2", "zero2", "zero3"), "all weights": ("fsdp2", "zero3")}
# What is trained, the layout that saves, and the one that goes on.
RESUMED = (
    ("LoRA", "fsdp2", "ddp"), ("LoRA", "fsdp2", ALONE), ("LoRA", "ddp", "fsdp2"), ("LoRA", "ddp", ALONE),
    ("all weights", "fsdp2", "ddp"),
)  # fmt: skip


# --- what is launched ------------------------------------------------------------------------------------------------


def global_batches(job, model, steps, output_dir, **settings):
    """A trainer whose global batch does not depend on the number of processes, and its stopwatch."""
    rows = random_rows(model.config, job["global_batch"] * steps, job["length"])
    return build_trainer(
        model,
        rows,
        output_dir,
        job["micro_batch"],
        adapter(job["rank"]) if job["trains"] == "LoRA" else None,
        prompt_length=min(PROMPT_LENGTH, job["length"] // 2),
        max_steps=steps,
        gradient_accumulation_steps=job["global_batch"] // job["micro_batch"] // PartialState().num_processes,
        logging_steps=1,
        **settings,
    )


def losses_of(trainer):
    return [entry["trajectory_loss"] for entry in trainer.state.log_history if "grad_norm" in entry]


def training(job, folder):
    model = load(job["shape"], job["device"])
    model.config.use_cache = False
    steps = job["warm_up"] + job["steps"]
    trainer, stopwatch = global_batches(
        job, model, steps, folder, save_strategy="no", gradient_checkpointing=job["trains"] == "all weights",
    )  # fmt: skip
    if job["device"] == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if job["device"] == "cuda" else 0
    peaks = trainer.accelerator.gather(torch.tensor([peak], device=trainer.accelerator.device))
    seconds = statistics.median(stopwatch.times[job["warm_up"] :])
    return {
        "seconds": seconds,
        "tokens_per_second": job["global_batch"] * job["length"] / seconds,
        "gibibytes": peaks.max().item() / 2**30,
        "losses": losses_of(trainer),
    }


def decoding(job, folder):
    state, model = PartialState(), load(job["shape"], job["device"])
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE, padding_side="left")
    task, size = find_task(TASK), {"batch_size": job["batch_size"], "shard_size": job["batch_size"]}
    settings = {"unmasking": "confidence", "max_new_tokens": job["answer"], "stop_at_eos": False}
    settings |= {"steps": job["answer"]}
    prompts = task.questions(split="validation", limit=job["prompts"]).remove_columns("row")
    # So that the timed calls find problems made, libraries loaded and memory allocated.
    task.load()
    model.generate(torch.full((job["batch_size"], 64), 5, device=model.device), **settings)

    def timed(function):
        state.wait_for_everyone()
        start = time.perf_counter()
        result = function()
        state.wait_for_everyone()
        return time.perf_counter() - start, result

    answering, rows = timed(
        lambda: generate_trajectories(model, tokenizer, prompts, f"{folder}/trajectories", **size, **settings)
    )
    judging, _ = timed(
        lambda: evaluate_task(task, model, tokenizer, f"{folder}/evaluation", limit=job["prompts"], **size, **settings)
    )
    return {
        "trajectories_per_second": job["prompts"] / answering,
        "evaluated_per_second": job["prompts"] / judging,
        "answers": [rows["input_ids"][:], (Path(folder) / "evaluation" / "samples.jsonl").read_text(encoding="utf-8")],
    }


def checkpoints(job, folder):
    model = load("example", job["device"]).float()  # as FSDP2 keeps what it trains
    half = job["steps"] // 2
    trainer, _ = global_batches(
        job, model, job["steps"], folder, save_strategy="steps", save_steps=half, learning_rate=1e-3,
        lr_scheduler_type="linear", bf16=False,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=job["resume"])
    trainer.save_model(folder)
    return {"losses": losses_of(trainer)}


def launched(arguments):
    """One row, by one of the processes; the first writes it."""
    job = json.loads(arguments.job)
    PartialState(cpu=job["device"] == "cpu")  # and each process has its own GPU now
    result = {"training": training, "decoding": decoding, "checkpoints": checkpoints}[job["part"]](job, job["folder"])
    if PartialState().is_main_process:
        arguments.row.write_text(json.dumps(result), encoding="utf-8")
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # threads of the process group now and then abort an orderly shutdown, when all is written


# --- what launches ---------------------------------------------------------------------------------------------------


def launch(layout, arguments, folder, **job):
    """What a job gives under a layout, with that and its number of processes; None, and `arguments.failed` says so, if
    it fails."""
    processes = 1 if layout == ALONE else arguments.processes
    job |= {"folder": str(folder), "device": "cuda" if torch.cuda.is_available() else "cpu"}
    row = Path(folder).with_suffix(".json")
    if torch.cuda.is_available():
        launcher = ["accelerate.commands.launch", "--config_file", CONFIGS / f"{layout}.yaml", "--num_processes"]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if layout == ALONE:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    precision = ["--mixed_precision", "no"] if torch.cuda.is_available() and job["part"] == "checkpoints" else []
    command = [
        sys.executable,
        "-m",
        *launcher,
        processes,
        *precision,
        __file__,
        "--job",
        json.dumps(job),
        "--row",
        row,
    ]
    process = subprocess.run(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    if process.returncode or not row.exists():
        arguments.failed.append(Path(folder).name)
        print(f"{Path(folder).name} failed:\n{process.stdout[-3000:]}", file=sys.stderr, flush=True)
        return None
    return {**json.loads(row.read_text(encoding="utf-8")), "layout": layout, "processes": processes}


def record(results, part, row, path):
    results[part].append(row)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def difference(values, others):
    return max(abs(value - other) for value, other in zip(values, others, strict=True))


def measure_training(arguments, folder, results):
    print("| trained | config | GPUs | ms | tokens/s | efficiency | GiB of each | losses differ by |")
    print("| --- " * 8 + "|", flush=True)
    names = ("shape", "length", "rank", "micro_batch", "global_batch", "steps", "warm_up")
    job = {name: getattr(arguments, name) for name in names}
    for trains, layouts in LAYOUTS.items():
        reference = None
        for layout in layouts:
            if layout not in arguments.layouts or trains not in arguments.trains:
                continue
            row = launch(layout, arguments, folder / f"{trains}-{layout}", part="training", trains=trains, **job)
            if row is None:
                print(f"| {trains} | `{layout}` | failed ||||||", flush=True)
                continue
            row["trains"], processes = trains, row["processes"]
            reference = reference or row
            row["difference"] = difference(row["losses"], reference["losses"])
            efficiency, apart = "", "" if row is reference else f"{row['difference']:.1e}"
            if reference["layout"] == ALONE:
                row["efficiency"] = row["tokens_per_second"] / processes / reference["tokens_per_second"]
                efficiency = f"{row['efficiency']:.3f}"
            record(results, "training", row, arguments.output)
            print(
                f"| {trains} | `{layout}` | {processes} | {1000 * row['seconds']:.0f} | "
                f"{row['tokens_per_second']:,.0f} | {efficiency} | {row['gibibytes']:.1f} | {apart} |",
                flush=True,
            )


def measure_decoding(arguments, folder, results):
    print("\n| | processes | trajectories/s | efficiency | evaluated/s | efficiency | answers |")
    print("| --- " * 7 + "|", flush=True)
    for layout in (ALONE, "ddp"):  # decoding has no other
        row = launch(
            layout, arguments, folder / f"decoding-{layout}", part="decoding", shape=arguments.shape,
            prompts=arguments.prompts, batch_size=arguments.decoding_batch, answer=arguments.answer,
        )  # fmt: skip
        if row is None:
            print(f"| `{layout}` | failed ||||||", flush=True)
            return  # without one process there is nothing to compare with
        answers, processes = row.pop("answers"), row["processes"]
        if layout == ALONE:
            alone, expected = row, answers
        row["same_answers"], cells = answers == expected, []
        for name in ("trajectories_per_second", "evaluated_per_second"):
            row[name.replace("per_second", "efficiency")] = efficiency = row[name] / processes / alone[name]
            cells.append(f"{row[name]:.2f} | {efficiency:.3f}")
        record(results, "decoding", row, arguments.output)
        same = "the same" if row["same_answers"] else "DIFFERENT"
        print(f"| `{layout}` | {processes} | {' | '.join(cells)} | {same} |", flush=True)


def measure_checkpoints(arguments, folder, results):
    """Of the example model, whatever the shape: it is about what is in the files."""
    print("\n| trained | saved under | resumed under | losses differ by | weights by | losses of both layouts by |")
    print("| --- " * 6 + "|", flush=True)
    job = {"part": "checkpoints", "length": 128, "rank": 8, "micro_batch": 2, "steps": 8}
    job["global_batch"] = 4 * arguments.processes
    known = {}

    def run(trains, layout, name, resume=None):
        """Losses and the folder of a run."""
        where = folder / name
        row = launch(layout, arguments, where, trains=trains, resume=resume and str(resume), **job)
        return row and (row["losses"], where)

    for trains, saving, resuming in RESUMED:
        if not {saving, resuming} <= set(arguments.layouts) or trains not in arguments.trains:
            continue
        kind = trains.replace(" ", "-")
        for layout in (saving, resuming):
            if (trains, layout) not in known:
                known[trains, layout] = run(trains, layout, f"{kind}-{layout}-unbroken")
        saved, other = known[trains, saving], known[trains, resuming]
        resumed = saved and run(trains, resuming, f"{kind}-{saving}-{resuming}", saved[1] / "checkpoint-4")
        if not (other and resumed):
            print(f"| {trains} | `{saving}` | `{resuming}` | failed |||", flush=True)
            continue
        weights = [merged_weights(where, trains) for _, where in (saved, resumed)]
        farthest = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
        row = {"trains": trains, "saved": saving, "resumed": resuming, "difference": farthest}
        row |= {"losses_difference": difference(resumed[0], saved[0]), "layouts": difference(other[0], saved[0])}
        record(results, "checkpoints", row, arguments.output)
        print(
            f"| {trains} | `{saving}` | `{resuming}` | {row['losses_difference']:.1e} | {farthest:.1e} "
            f"| {row['layouts']:.1e} |",
            flush=True,
        )


def merged_weights(folder, trains):
    if trains == "LoRA":
        tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
        merge_adapter(
            folder, folder / "merged", tokenizer, base_model=EXAMPLE, model_init_kwargs={"dtype": torch.float32}
        )
        folder = folder / "merged"
    return load_file(folder / "model.safetensors")


def main():
    parser = CommandParser(__doc__)
    add_shape_argument(parser)
    parser.add_argument(
        "--processes",
        type=int,
        default=torch.cuda.device_count(),
        help="number of processes, at least 2 (default: one for each GPU)",
    )
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what is measured (default: all)"
    )
    layouts = LAYOUTS["LoRA"] if torch.cuda.is_available() else (ALONE, "ddp")  # the others need GPUs
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=layouts,
        choices=layouts,
        help="files of accelerate_configs, by their names (default: all that the machine can run)",
    )
    parser.add_argument(
        "--trains", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="which weights are trained (default: both)"
    )
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: 384, with --shape example 192)")
    parser.add_argument("--rank", type=int, default=128, help="rank of the LoRA")
    parser.add_argument("--micro_batch", type=int, default=4, help="number of sequences that a GPU takes at a time")
    parser.add_argument(
        "--global_batch", type=int, default=64, help="number of sequences of a step over all GPUs; 64 as published"
    )
    parser.add_argument("--steps", type=int, default=5, help="number of steps that are timed")
    parser.add_argument("--warm_up", type=int, default=2, help="number of steps before those, which are not timed")
    parser.add_argument(
        "--prompts", type=int, default=256, help="number of prompts that are answered, to time decoding"
    )
    parser.add_argument(
        "--decoding_batch", type=int, default=16, help="number of prompts that a process answers at a time"
    )
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer, one a pass")
    parser.add_argument("--output", type=Path, default=Path("scale_out.json"), help="file for every row of the tables")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.failed = []
    if arguments.job:
        return launched(arguments)
    if arguments.processes < 2:
        parser.error(f"--processes {arguments.processes}: it must be at least 2")
    if arguments.global_batch % (arguments.micro_batch * arguments.processes):
        parser.error(
            f"--global_batch {arguments.global_batch}: it must be a multiple of --micro_batch times --processes"
        )
    arguments.length = arguments.length or (192 if arguments.shape == "example" else 384)
    results = {**here_and_now(), "processes": arguments.processes, "shape": arguments.shape}
    results |= {"length": arguments.length, "global_batch": arguments.global_batch, **{part: [] for part in PARTS}}
    where = f"{arguments.processes} x {results['hardware']}, {results['versions']}, {results['date']}"
    print(f"{where}: {arguments.shape}\n", flush=True)
    measures = {"training": measure_training, "decoding": measure_decoding, "checkpoints": measure_checkpoints}
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            measures[part](arguments, Path(folder), results)
    if arguments.failed:
        arguments.output.write_text(
            json.dumps(results | {"failed": arguments.failed}, indent=1) + "\n", encoding="utf-8"
        )
        sys.exit(f"failed: {', '.join(arguments.failed)}")
    where = "examples/accelerate_configs"
    print(
        f"In {arguments.output}: every row. Next, to train under one of {where}: accelerate launch --config_file "
        f"{where}/ddp.yaml examples/distill.py --config examples/recipes/llada_8b.yaml --output_dir runs/llada"
    )


if __name__ == "__main__":
    main()
