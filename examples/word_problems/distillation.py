"""Distil the example model of word problems by certainty forcing, and measure what each part of the method is worth.

The teacher, `examples/word_problems/checkpoint`, answers training problems. Students, one for each variant and seed,
learn from its right answers. Some of them then are the teacher of a next round, and so on: each round answers in fewer
passes, since what the one before it chose among equally good wordings is what the next one learns. Teacher and
students solve test problems over a range of thresholds, the last student all 5,000 at the threshold that was chosen
for it on validation problems. Out come `report.md`, `distillation.json`, `accuracy_against_nfe.png` and the folder
`student` with its `results.json`.

What was computed is not computed again: after a kill, the same command goes on. A small model leaves a GPU idle while
the next student is compiled, so after `--until trajectories` several processes may share the students, each with
`--until curves` and its own `--variants` or `--seeds`, before the command without these makes the report. The second
command is a try on a CPU; the third draws the picture alone.

    python examples/word_problems/distillation.py --output_dir runs/distillation --num_proc 16
    python examples/word_problems/distillation.py --output_dir runs/try \\
        --num_prompts 64 --max_steps 3 --batch_size 8 --problems 8 --seeds 0
    python examples/word_problems/distillation.py --redraw examples/word_problems/student
"""

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from evaluate_word_problems import WORD_PROBLEMS
from problems import NUM_TEST_PROBLEMS, is_correct, to_conversation
from solving import ANSWER_LENGTH
from train import generated_dataset
from transformers import AutoTokenizer

from dparallel.evaluation.evaluation import evaluate_task, seconds_of, to_entries, verdicts_of, write_measurements
from dparallel.evaluation.plot import POLICY_COLOURS, Curve, plot, shades, with_aup, without_seconds
from dparallel.evaluation.students import curves_of_teacher, folder_of, nfe_at, of_policy, spread, train_student
from dparallel.evaluation.sweep import sweep
from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.hub_cards.measurements import RESULTS_FILE, fastest, from_entries, paired_difference
from dparallel.modeling import LLaDAModelLM
from dparallel.trainer import generate_trajectories
from dparallel.trainer.trajectories import model_digest

RESULTS, PICTURE = "distillation.json", "accuracy_against_nfe.png"
TEACHER = Path(__file__).parent / "checkpoint"
PROMPT_SEED = 7  # of the first round's problems
ALLOWED_LOSS = 0.01  # of accuracy, against one token a step

# Block-wise masks as dParallel draws them, but with the ratio drawn for each example instead of 1/2: with half of a
# block in sight the rest is easy, and it is the first passes over an empty block that decoding is slow in.
TRAINING = {  # of a model this small, whatever it learns
    "lr_scheduler_type": "cosine", "weight_decay": 0.01, "adam_beta2": 0.98, "bf16": torch.cuda.is_available(),
    "pad_to_multiple_of": 32, "dataloader_drop_last": True, "logging_steps": 100, "save_strategy": "no",
    "report_to": "none",
}  # fmt: skip
ANY_RATIO = {"mask_ratio": 1.0, "mask_ratio_low": 0.0}
VARIANTS = {
    "trajectory loss only": {**ANY_RATIO, "certainty_weight": 0.0},
    "certainty loss only": {**ANY_RATIO, "trajectory_weight": 0.0},
    "both losses": ANY_RATIO,
    "both losses, certainty weight 0.5": {**ANY_RATIO, "certainty_weight": 0.5},
    "both losses, certainty temperature 1": {**ANY_RATIO, "certainty_temperature": 1.0},
    "both losses, masks not block-wise": {**ANY_RATIO, "masking": "response"},
    "both losses, masks in trajectory order": {**ANY_RATIO, "masking": "trajectory"},
    "trajectory loss only, half of a block masked": {"certainty_weight": 0.0},
    "both losses, half of a block masked": {},
}
WHOLE_METHOD = "both losses"
WITH_ROUNDS, FIRST_SEED = ("trajectory loss only", WHOLE_METHOD), 0  # which students become teachers


TEACHER_GRID = {
    "confidence": [ANSWER_LENGTH, 96, 64, 32, 16],
    "confidence_threshold": [0.7, 0.8, 0.9, 0.95],
    "entropy_threshold": [0.1, 0.3, 0.5, 0.6, 0.7],
    "entropy_bound": [0.1, 0.2, 0.4, 0.8],
}
ONE_TOKEN = {"unmasking": "confidence", "steps": ANSWER_LENGTH}
STUDENT_GRID = {
    "entropy_threshold": [0.05, 0.1, 0.2, 0.3, 0.5],
    "entropy_bound": [0.05, 0.1, 0.2, 0.4],
}


def judge(row):
    return is_correct(row["response"], row["answer"])


_models = {}


def load(path):
    """For decoding: on a GPU in bfloat16 and compiled, once for all models, which all have the same shape."""
    if not torch.cuda.is_available():
        return LLaDAModelLM.from_pretrained(path).eval()
    model = LLaDAModelLM.from_pretrained(path, dtype=torch.bfloat16).to("cuda").eval()
    if not _models:
        model.compile(dynamic=True)  # a model this small is bound by elementwise operations, which this fuses
    compiled = _models.setdefault("compiled", model)
    compiled.load_state_dict(model.state_dict())
    return compiled


def to_prompt(problem):
    return {"prompt": to_conversation(problem)["prompt"], "answer": problem.answer}


def prompts(count, seed, num_proc):
    with tempfile.TemporaryDirectory() as cache:
        dataset = generated_dataset(to_prompt, "train", count, seed, num_proc or 1, cache)
        return Dataset.from_list(dataset.to_list()[:count])


def right_answers(teacher, folder, seed, arguments, tokenizer):
    """A teacher's answers to training problems, those that are right. At an entropy threshold of 0.1 the first
    teacher needs a quarter of the passes of one token a step, and is no less accurate."""
    rows = generate_trajectories(
        load(teacher),
        tokenizer,
        prompts(arguments.num_prompts, seed, arguments.num_proc),
        folder,
        judge,
        batch_size=2048,
        shard_size=8192,
        num_proc=arguments.num_proc,
        max_new_tokens=ANSWER_LENGTH,
        unmasking="entropy_threshold",
        threshold=0.1,
    )
    right = rows.filter(lambda row: row["correct"], num_proc=arguments.num_proc)
    print(f"{len(right)} of the teacher's {len(rows)} answers are right.")
    return right


def student_of(teacher, folder, dataset, tokenizer, arguments, seed, changes):
    """A student in `folder / "model"`: one cell of the table, computed once for its settings."""
    settings = {
        "seed": seed,
        "max_length": 256,
        "response_length": ANSWER_LENGTH,
        "max_steps": arguments.max_steps,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "warmup_steps": 50,
        "torch_compile": torch.cuda.is_available(),
        **TRAINING,
        **changes,
    }
    workers = 4 if torch.cuda.is_available() else 0
    return train_student(
        teacher, folder, dataset, tokenizer, settings, digest=model_digest(load(teacher)),
        dataset_num_proc=arguments.num_proc, dataloader_num_workers=workers,
    )  # fmt: skip


def report(results, folder):
    """Tables as Markdown, and the plot, from what is in `distillation.json`."""
    teacher = from_entries(results["teacher"], RESULTS)
    students = [
        {**student, "rounds": [from_entries(points, RESULTS) for points in student["rounds"]]}
        for student in results["students"]
    ]
    target = teacher[0].accuracy - ALLOWED_LOSS  # the first is one token a step
    policies = ("entropy_threshold", "entropy_bound")
    lines = [
        f"NFE at which {100 * target:.1f}% are right, {100 * ALLOWED_LOSS:.0f} point less than the teacher at one "
        f"token a step ({teacher[0].num_examples} problems, no stop at end-of-text):",
        "",
        "| model | entropy threshold | entropy bound | other policy |",
        "| --- | --- | --- | --- |",
    ]
    others = ", ".join(
        f"{name.replace('_', ' ')}: {spread([nfe_at(of_policy(teacher, name), target)])}"
        for name in ("confidence", "confidence_threshold")
    )
    cells = [spread([nfe_at(of_policy(teacher, policy), target)]) for policy in policies]
    lines.append(f"| teacher | {' | '.join(cells)} | {others} |")
    by_name = {}
    for student in students:
        for number, points in enumerate(student["rounds"], start=1):
            name = student["variant"] if number == 1 else f"{student['variant']}, round {number}"
            by_name.setdefault(name, []).append(points)
    for name, seeds in by_name.items():
        cells = [spread([nfe_at(of_policy(points, policy), target) for points in seeds]) for policy in policies]
        lines.append(f"| {name} | {' | '.join(cells)} | |")
    lines += [
        "",
        "| | decoding | NFE | TPF | TPF with padding | accuracy % | student - teacher |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    chosen = from_entries(results["chosen"], RESULTS)
    for point, difference in zip(chosen, results["differences"], strict=True):
        padded = "" if point.decoding["stop_at_eos"] else f"{ANSWER_LENGTH / point.nfe:.1f}"
        lines.append(
            f"| {point.model or 'student'} | {point.settings} | {point.nfe:.1f} | {point.tpf:.2f} | "
            f"{padded} | {100 * point.accuracy:.1f} | {difference} |"
        )
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    draw(results, folder)


def draw(results, folder):
    """`accuracy_against_nfe.png`, from what is in `distillation.json`: students at the entropy threshold, the darker
    the later their round, and the teacher in grey."""
    teacher = from_entries(results["teacher"], RESULTS)
    curves, number_of_rounds = [], max(len(student["rounds"]) for student in results["students"])
    colours = shades(POLICY_COLOURS["entropy_threshold"], number_of_rounds)
    for variant, line in zip(reversed(WITH_ROUNDS), ("-", "--"), strict=True):
        rounds = next(student["rounds"] for student in results["students"] if student["variant"] == variant)
        for number, (entries, colour) in enumerate(zip(rounds, colours, strict=False), start=1):
            points = of_policy(from_entries(entries, RESULTS), "entropy_threshold")
            name = f"round {number}" if variant == WHOLE_METHOD else f"{variant}, round {number}"
            curves.append(Curve(name, points, colour, line))
    curves += curves_of_teacher(teacher, TEACHER_GRID)
    title = f"{teacher[0].num_examples} word problems, no stop at end-of-text; students (blue) at entropy threshold"
    plot(with_aup(without_seconds(curves)), folder / PICTURE, title, bar=teacher[0].accuracy - ALLOWED_LOSS)


def main():
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/distillation"), help="folder for all that is computed"
    )
    parser.add_argument("--num_prompts", type=int, default=40_000, help="number of training problems of a round")
    parser.add_argument("--max_steps", type=int, default=600, help="optimizer steps of each student")
    parser.add_argument("--batch_size", type=int, default=384, help="examples of a step")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the students of each variant"
    )
    parser.add_argument(
        "--rounds", type=int, default=4, help="rounds in which the student of one is the teacher of the next"
    )
    parser.add_argument(
        "--problems", type=int, default=NUM_TEST_PROBLEMS, help="number of problems of the final comparison"
    )
    parser.add_argument(
        "--ablation_problems", type=int, default=2000, help="number of problems of each point of the curves"
    )
    stages = ["trajectories", "curves", "report"]
    parser.add_argument("--until", default="report", choices=stages, help="stage after which to stop")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=VARIANTS,
        metavar="VARIANT",
        help="variants of the method, by their names in the report (default: all)",
    )
    parser.add_argument(
        "--num_proc", type=int, help="number of processes that generate and tokenize problems (default: one)"
    )
    parser.add_argument(
        "--redraw", type=Path, help=f"folder with a {RESULTS}, for which only {PICTURE} is drawn (default: none)"
    )
    arguments = parser.parse_args()
    if arguments.redraw is not None:
        with plain_errors(OSError, ValueError):
            draw(json.loads((arguments.redraw / RESULTS).read_text(encoding="utf-8")), arguments.redraw)
        return print(f"In {arguments.redraw}: {PICTURE}.")
    if arguments.until == "report" and not (
        FIRST_SEED in arguments.seeds and set(WITH_ROUNDS) <= set(arguments.variants)
    ):
        parser.error(f"a report needs seed {FIRST_SEED} and the variants {WITH_ROUNDS}; else say --until curves")
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER, padding_side="left")

    dataset = right_answers(TEACHER, folder / "trajectories", PROMPT_SEED, arguments, tokenizer)
    if arguments.until == "trajectories":
        print(f"In {folder / 'trajectories'}: the answers. Next: the same command with --until curves.")
        return
    students = {}  # the folders of each student's rounds
    for variant, seed in itertools.product(arguments.variants, arguments.seeds):
        path = folder_of(folder, variant, seed)
        rounds = students[variant, seed] = [path / "round-1"]
        student_of(TEACHER, path / "round-1", dataset, tokenizer, arguments, seed, VARIANTS[variant])
        with_rounds = variant in WITH_ROUNDS and seed == FIRST_SEED
        for number in range(2, arguments.rounds + 1 if with_rounds else 2):
            teacher, prompt_seed = rounds[-1] / "model", PROMPT_SEED + number - 1
            answers = right_answers(teacher, path / f"trajectories-{number}", prompt_seed, arguments, tokenizer)
            rounds.append(path / f"round-{number}")
            student_of(teacher, rounds[-1], answers, tokenizer, arguments, seed, VARIANTS[variant])

    def amount(limit):
        limit = min(limit, arguments.problems)
        return {"limit": limit, "batch_size": 1024, "shard_size": limit}

    few, validation = amount(arguments.ablation_problems), {"split": "validation", **amount(2000)}

    def measure_all(path, grid, where, amount=few):
        return sweep(WORD_PROBLEMS, load(path), tokenizer, where, grid, **amount, stop_at_eos=False)

    def measure_one(path, decoding, where, amount, stop_at_eos=False):
        point = evaluate_task(
            WORD_PROBLEMS, load(path), tokenizer, where, **amount, **decoding, stop_at_eos=stop_at_eos
        )
        return replace(point, seconds=seconds_of(where), model="teacher" if path == TEACHER else None)

    curves = []
    for (variant, seed), rounds in students.items():
        points = [to_entries(measure_all(path / "model", STUDENT_GRID, path / "curve")) for path in rounds]
        curves.append({"variant": variant, "seed": seed, "rounds": points})
    if arguments.until == "curves":
        print(f"In {folder / 'students'}: the students and their curves. Next: the same command without --until.")
        return
    measured = folder / "measured"
    teacher = measure_all(TEACHER, TEACHER_GRID, measured / "teacher")

    # The last student's way of decoding is chosen where the test problems are not looked at.
    latest = students[WHOLE_METHOD, FIRST_SEED][-1] / "model"
    bar = measure_one(TEACHER, ONE_TOKEN, measured / "validation-teacher", validation).accuracy
    candidates = measure_all(latest, STUDENT_GRID, measured / "validation-student", validation)
    best = fastest(candidates, bar - ALLOWED_LOSS / 2) or max(candidates, key=lambda point: point.accuracy)
    decoding = {name: best.decoding[name] for name in ("unmasking", "threshold")}
    model = LLaDAModelLM.from_pretrained(latest)
    model.generation_config.update(**decoding)
    model.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    chosen, differences = [], []
    for stop in (False, True):
        folders = [measured / f"chosen-{name}-{stop}" for name in ("teacher", "student")]
        for path, way, where in zip((TEACHER, latest), (ONE_TOKEN, decoding), folders, strict=True):
            chosen.append(measure_one(path, way, where, amount(arguments.problems), stop))
        slow, fast = map(verdicts_of, folders)
        differences += ["", str(paired_difference(fast, slow))]
    results = {
        "settings": {name: getattr(arguments, name) for name in ("num_prompts", "max_steps", "batch_size", "rounds")},
        "teacher": to_entries(teacher),
        "students": curves,
        "chosen": to_entries(chosen),
        "differences": differences,  # of their accuracy: student - teacher
    }
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_measurements(chosen, folder / "student" / RESULTS_FILE)
    report(results, folder)
    print(
        f"In {folder}: report.md, distillation.json, accuracy_against_nfe.png and the student. Next, for its card: "
        f"python -m dparallel.hub_cards.push_model {folder / 'student'} user/my-model --dry_run {folder / 'card'}"
    )


if __name__ == "__main__":
    main()
