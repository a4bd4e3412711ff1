"""Does certainty forcing pay where language is uncertain? Distillation of a model with real weights.

The teacher, which `fine_tune.py` made, answers training problems in few passes. Students, one for each variant and
seed, learn from its answers, and in a second round from a student's own. Teacher and students answer the tests of
`rows.py` over a range of thresholds. Out come, in `output_dir`, `study.json`, `report.md` and a picture for each test.

What was computed is not computed again: after a kill, the same command goes on. It uses one GPU; where there are more,
CUDA_VISIBLE_DEVICES must name one. Several such processes may share the students after `--until trajectories` (which
`accelerate launch` spreads over GPUs), each with `--until curves` and `--variants` of its own, and the same `--seeds`;
the command without these then writes the report. The second command is a try.

    python examples/gsm8k/study.py --teacher runs/gsm8k/teacher/merged --rows runs/gsm8k/rows \\
        --output_dir runs/gsm8k/study
    python examples/gsm8k/study.py --teacher runs/gsm8k/teacher/merged --rows runs/gsm8k/rows \\
        --output_dir runs/try --num_prompts 64 --max_steps 3 --batch_size 4 --limit 8 --seeds 0
"""

import functools
import itertools
import json
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from rows import GSM8K_REST, SYMBOLIC_SEEN, SYMBOLIC_UNSEEN
from transformers import AutoModelForCausalLM, AutoTokenizer

from dparallel.evaluation.evaluation import to_entries, verdicts_of
from dparallel.evaluation.metrics import same_number
from dparallel.evaluation.plot import Curve, aup_of, plot, shades, without_seconds
from dparallel.evaluation.students import (
    curves_of_teacher,
    folder_of,
    mean_and_range,
    nfe_at,
    of_policy,
    spread,
    train_student,
)
from dparallel.evaluation.sweep import decodings_of, sweep
from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.hub_cards.measurements import here_and_now, paired_difference
from dparallel.trainer import generate_trajectories
from dparallel.trainer.trajectories import model_digest

TASKS = {"gsm8k": GSM8K_REST, "symbolic_seen": SYMBOLIC_SEEN, "symbolic_unseen": SYMBOLIC_UNSEEN}
ANSWER_LENGTH = 256
TEACHER_GRID = {
    "confidence": [ANSWER_LENGTH],
    "confidence_threshold": [0.7, 0.8, 0.9, 0.95],
    "entropy_threshold": [0.05, 0.1, 0.3, 0.6],
    "entropy_bound": [0.05, 0.1, 0.2, 0.4],
}
STUDENT_GRID = {"entropy_threshold": [0.1, 0.3, 0.6, 1.0]}
ALLOWED_LOSS = 0.02  # of accuracy, against the teacher's best thresholded policy

# Fields of `CertaintyForcingConfig`; of what a student learns from and how, the other keys.
BOTH = {"certainty_weight": 2.0, "mask_ratio": 1.0, "mask_ratio_low": 0.0}
TRAJECTORY = {**BOTH, "certainty_weight": 0.0}
VARIANTS = {
    "trajectory loss only": TRAJECTORY,
    "both losses": BOTH,
    "both losses, certainty weight 0.5": {**BOTH, "certainty_weight": 0.5},
    "certainty loss only": {**BOTH, "trajectory_weight": 0.0},
    "both losses, half of a block masked": {"certainty_weight": 2.0},
    "both losses, masks in trajectory order": {**BOTH, "masking": "trajectory"},
    "both losses, right answers only": BOTH,
    "both losses, LoRA": BOTH,
    "both losses, second round": BOTH,
    "trajectory loss only, second round": TRAJECTORY,
}
MAIN = ("trajectory loss only", "both losses")  # trained with all seeds, the others with the first
TRAINING = {
    "max_length": 384, "lr_scheduler_type": "cosine", "warmup_steps": 20, "weight_decay": 0.01, "adam_beta2": 0.98,
    "bf16": torch.cuda.is_available(), "train_sampling_strategy": "group_by_length", "pad_to_multiple_of": 128,
    "dataloader_drop_last": True, "logging_steps": 50, "save_strategy": "no", "report_to": "none",
}  # fmt: skip


def judge(row):
    return same_number(row["response"], row["answer"])


def load(path):
    """A model for decoding."""
    is_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if is_gpu else torch.float32)
    return model.to(PartialState(cpu=not is_gpu).device).eval()


def read_prompts(path, first, count):
    """Training problems, from one on."""
    rows = GSM8K_REST.load(data=path)  # of the same columns as the tests
    if first + count > len(rows):
        raise ValueError(
            f"`num_prompts={count}` is not allowed: {path} has too few problems for that many in each round."
        )
    rows = rows.select(range(first, first + count))
    chats = [[{"role": "user", "content": question}] for question in rows["question"]]
    return Dataset.from_dict({"prompt": chats, "answer": rows["answer"][:]})


@functools.cache
def digest_of(path):
    """Of a model for decoding."""
    return model_digest(load(path))


class Study:
    """All that is computed, in its folders."""

    def __init__(self, arguments):
        self.arguments, self.folder = arguments, arguments.output_dir
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.teacher, padding_side="left")
        limit = arguments.limit
        self.amount = {"data": arguments.rows, "limit": limit, "batch_size": arguments.decoding_batch_size}
        self.amount["shard_size"] = limit or 2000  # one: only among its rows do ended ones make room for others
        self.found = {}  # the answers that were asked for, by their folders

    def answers(self, teacher, folder, round_number):
        """A teacher's answers to the problems of a round."""
        if folder in self.found:
            return self.found[folder]
        count = self.arguments.num_prompts
        rows = self.found[folder] = generate_trajectories(
            load(teacher),
            self.tokenizer,
            read_prompts(self.arguments.rows / "prompts.jsonl", (round_number - 1) * count, count),
            folder,
            judge,
            batch_size=self.arguments.decoding_batch_size,
            shard_size=4 * self.arguments.decoding_batch_size,
            max_new_tokens=ANSWER_LENGTH,
            unmasking="entropy_threshold",
            threshold=0.1,
        )
        print(f"{sum(rows['correct'])} of the {len(rows)} answers of {teacher} are right.")
        return rows

    def student(self, variant, seed):
        """The folder of a student's model, and of what it takes to train it."""
        teacher, round_number, where = self.arguments.teacher, 1, self.folder / "trajectories"
        if variant.endswith("second round"):
            before = variant.removesuffix(", second round")
            teacher, round_number = self.student(before, seed), 2
            where = folder_of(self.folder, before, seed) / "trajectories"
        rows = self.answers(teacher, where, round_number)
        if variant.endswith("right answers only"):
            rows = rows.filter(lambda row: row["correct"])
        settings = {
            "seed": seed,
            "max_steps": self.arguments.max_steps,
            "per_device_train_batch_size": self.arguments.batch_size,
            "learning_rate": self.arguments.learning_rate,
            **TRAINING,
            **VARIANTS[variant],
        }
        adapter = None
        if variant.endswith("LoRA"):  # at the learning rate that such adapters are published with, times ten
            adapter, settings["learning_rate"] = LoraConfig(r=128, lora_alpha=128, target_modules="all"), 2e-4
        return train_student(
            teacher, folder_of(self.folder, variant, seed), rows, self.tokenizer, settings, digest=digest_of(teacher),
            peft_config=adapter, dataloader_num_workers=4 if torch.cuda.is_available() else 0,
        )  # fmt: skip

    def curves(self, model, where, grid):
        """Points of all tests, and the verdicts of each, in the same order."""
        model, found = load(model), {}
        for name, task in TASKS.items():
            points = sweep(task, model, self.tokenizer, where / name, grid, **self.amount)
            folders = [where / name / point for point in decodings_of(model, grid)]
            found[name] = {"points": points, "verdicts": [verdicts_of(folder) for folder in folders]}
        return found


def best_of_teacher(curve):
    """The number of the teacher's most accurate thresholded point."""
    numbers = [i for i, point in enumerate(curve["points"]) if point.decoding["unmasking"] != "confidence"]
    return max(numbers, key=lambda i: (curve["points"][i].accuracy, -curve["points"][i].nfe))


def fewest_passes(curve, policy, verdicts):
    """In words, the point with the fewest passes whose accuracy is, with all of its interval, less than `ALLOWED_LOSS`
    below these verdicts', and the difference."""
    found = []
    for point, its in zip(curve["points"], curve["verdicts"], strict=True):
        difference = paired_difference(its, verdicts)
        if point.decoding["unmasking"] == policy and difference.low > -ALLOWED_LOSS:
            found.append((point, difference))
    if not found:
        return "none"
    point, difference = min(found, key=lambda pair: pair[0].nfe)
    return f"{point.nfe:.1f} ({point.settings}): {difference}"


def report(teacher, students):
    """Markdown: for each test the teacher's points, where each student's curve reaches the teacher's accuracy less
    what may be lost, and the point with the fewest passes whose interval excludes a larger loss."""
    lines = []
    for name, task in TASKS.items():
        points, verdicts = teacher[name]["points"], teacher[name]["verdicts"]
        best = best_of_teacher(teacher[name])
        bar = points[best].accuracy - ALLOWED_LOSS
        curves = [teacher, *itertools.chain(*students.values())]
        highest = max(point.accuracy for each in curves for point in each[name]["points"])
        lines += [
            f"## {task.name}, {points[0].num_examples} problems",
            "",
            "| teacher | NFE | TPF | accuracy % (95% interval) |",
            "| --- | --- | --- | --- |",
            *(f"| {each.settings} | {each.nfe:.1f} | {each.tpf:.2f} | {each.accuracy_in_words} |" for each in points),
            "",
            f"Its most accurate thresholded policy: {points[best].settings}. AUP is with the best accuracy of all, "
            f"{100 * highest:.1f}%, as y_max.",
            "",
            f"| model | NFE at {100 * bar:.1f}% | AUP | fewest passes of a point whose interval excludes a loss of "
            f"{100 * ALLOWED_LOSS:.0f} points, first seed |",
            "| --- | --- | --- | --- |",
        ]
        rows = {f"teacher, {policy.replace('_', ' ')}": ([teacher], policy) for policy in TEACHER_GRID}
        rows |= {variant: (found, "entropy_threshold") for variant, found in students.items()}
        for label, (found, policy) in rows.items():
            seeds = [each[name] for each in found]
            of_seeds = [of_policy(each["points"], policy) for each in seeds]
            areas = mean_and_range([aup_of(each, highest) for each in of_seeds], 0)
            cells = [spread([nfe_at(each, bar) for each in of_seeds]), areas]
            lines.append(f"| {' | '.join([label, *cells, fewest_passes(seeds[0], policy, verdicts[best])])} |")
        lines.append("")
    return "\n".join(lines)


def draw(teacher, students, folder):
    """A picture for each test: the teacher in grey, students in deepening blue."""
    for name, task in TASKS.items():
        points = teacher[name]["points"]
        curves = curves_of_teacher(points, TEACHER_GRID)
        for (variant, found), colour in zip(students.items(), shades("tab:blue", len(students)), strict=True):
            line = "--" if variant.startswith("trajectory") else "-"
            curves.append(Curve(variant, of_policy(found[0][name]["points"], "entropy_threshold"), colour, line))
        where = f"{points[0].num_examples} problems, {points[0].hardware}, {points[0].date}"
        bar = points[best_of_teacher(teacher[name])].accuracy - ALLOWED_LOSS
        title = f"{task.name}, {where}; students at entropy threshold"
        plot(without_seconds(curves), folder / f"{name}.png", title, bar=bar)


def check_processes(arguments):
    """Raises `ValueError` where several processes or GPUs would have to work together."""
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes > 1 and arguments.until != "trajectories":
        raise ValueError("`accelerate launch` is for `--until trajectories` alone: start this by `python`.")
    if state.num_processes == 1 and torch.cuda.device_count() > 1:
        raise ValueError(
            f"There are {torch.cuda.device_count()} GPUs: let the environment variable CUDA_VISIBLE_DEVICES name one."
        )


def main():
    parser = CommandParser(__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the fine-tuned model")
    parser.add_argument("--rows", type=Path, required=True, help="folder that rows.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for all that is computed")
    parser.add_argument("--num_prompts", type=int, default=12_288, help="problems that a round learns from")
    parser.add_argument("--max_steps", type=int, default=400, help="optimizer steps of each student")
    parser.add_argument("--batch_size", type=int, default=32, help="examples of a step, each in two views")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="highest learning rate, but 2e-4 for LoRA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students of the main variants")
    parser.add_argument("--limit", type=int, help="problems of each test, from the first on (default: all)")
    parser.add_argument("--decoding_batch_size", type=int, default=512, help="problems that are answered at a time")
    stages = ["trajectories", "curves", "report"]
    parser.add_argument("--until", default="report", choices=stages, help="stage after which to stop")
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT",
        help="variants of the method, by their names in the report (default: all)",
    )  # fmt: skip
    arguments = parser.parse_args()
    with plain_errors(ValueError, OSError):
        check_processes(arguments)
        study = Study(arguments)
        if any(name.endswith("second round") for name in arguments.variants):
            read_prompts(arguments.rows / "prompts.jsonl", arguments.num_prompts, arguments.num_prompts)
        for task in TASKS.values():
            task.questions(data=arguments.rows, limit=1)
        study.answers(arguments.teacher, study.folder / "trajectories", 1)
        if arguments.until == "trajectories":
            print(f"In {study.folder / 'trajectories'}: the answers. Next: the same command with --until curves.")
            return
        students = {}
        for variant, seed in itertools.product(arguments.variants, arguments.seeds):
            if variant in MAIN or seed == arguments.seeds[0]:
                model = study.student(variant, seed)
                curves = study.curves(model, folder_of(study.folder, variant, seed) / "curves", STUDENT_GRID)
                students.setdefault(variant, []).append(curves)
        if arguments.until == "curves":
            print(f"In {study.folder / 'students'}: students and curves. Next: the same command without --until.")
            return
        teacher = study.curves(arguments.teacher, study.folder / "teacher", TEACHER_GRID)
    names = ("num_prompts", "max_steps", "batch_size", "learning_rate", "seeds", "limit", "variants")
    settings = {name: getattr(arguments, name) for name in names}

    def entries(curves):
        return {name: to_entries(curve["points"]) for name, curve in curves.items()}

    results = {**here_and_now(), "settings": settings, "teacher": entries(teacher)}
    results["students"] = {variant: [entries(each) for each in found] for variant, found in students.items()}
    (study.folder / "study.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = report(teacher, students)
    (study.folder / "report.md").write_text(text + "\n", encoding="utf-8")
    draw(teacher, students, study.folder)
    print(text)
    model = folder_of(study.folder, arguments.variants[-1], arguments.seeds[0]) / "model"
    print(
        f"In {study.folder}: study.json, report.md and pictures. Next, for a student's card: python -m "
        f"dparallel.hub_cards.push_model {model} user/my-model --dry_run {study.folder / 'card'}"
    )


if __name__ == "__main__":
    main()
