"""Accuracy against forward passes and seconds, over policies, thresholds and caches.

Writes `results.json` (every point, as cards read it), `sweep.md` and `sweep.png`, which `python -m
dparallel.evaluation.plot` draws again from `results.json`. After a kill it goes on where it was; a point that was
decoded in two parts has no seconds. Seconds include judging, but not the first batch of a policy and cache, which is
decoded once more beforehand: on a GPU it also captures CUDA graphs.

    python -m dparallel.evaluation.sweep --task gsm8k --model user/repo --limit 200 \\
        --unmasking entropy_threshold=0.1,0.3,0.5 confidence_threshold=0.8,0.9 --block_cache none dual
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.hub_cards.measurements import RESULTS_FILE, Measurement
from dparallel.modeling import POLICIES
from dparallel.modeling.generation_config_diffusion import BLOCK_CACHES

from .command_line import (
    add_data_arguments,
    add_model_arguments,
    add_task_argument,
    data_arguments,
    find_task,
    in_words,
    load_model,
    origin_from,
)
from .evaluation import check_decoding, evaluate_task, has_no_answers, seconds_of, write_measurements
from .plot import aup, curves_of, plot, title_of, with_aup
from .tasks import Task

AUP = (
    "AUP, accuracy under parallelism (arXiv 2601.07568), is the area under a policy's accuracy in percent against its "
    "tokens per forward pass: higher is better."
)
EVALUATION_ARGUMENTS = frozenset(evaluate_task.__kwdefaults__ or ())  # the others are of generate()
DEFAULT_GRID = {
    "confidence_threshold": [0.7, 0.8, 0.9, 0.95],
    "entropy_threshold": [0.05, 0.1, 0.2, 0.3, 0.5],
    "entropy_bound": [0.05, 0.1, 0.2, 0.4],
}


def number_of(unmasking: str) -> str:
    """The argument of `generate()` that says how fast a policy is."""
    return "steps" if POLICIES[unmasking].is_scheduled else "threshold"


def parse_grid(words: Iterable[str]) -> dict[str, list[float]]:
    """["entropy_threshold=0.1,0.3", ...] to {"entropy_threshold": [0.1, 0.3], ...}.

    Raises:
        ValueError: naming the word, for an unknown policy or what is no number.
    """
    grid = {}
    for word in words:
        unmasking, _, values = word.partition("=")
        if unmasking not in POLICIES:
            raise ValueError(
                f"`unmasking={word!r}` is not allowed: it must be POLICY=NUMBER,NUMBER,... with a policy of "
                f"{sorted(POLICIES)}."
            )
        kind, numbers = (int, "whole numbers of steps") if POLICIES[unmasking].is_scheduled else (float, "thresholds")
        try:
            grid.setdefault(unmasking, []).extend(kind(value) for value in values.split(","))
        except ValueError as error:
            raise ValueError(
                f"`unmasking={word!r}` is not allowed: behind `{unmasking}=`, it must have {numbers}, separated by "
                f"commas."
            ) from error
    return grid


def sweep(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    grid: dict[str, list[float]],
    *,
    caches: Sequence[str | None] = (None,),
    **arguments: Any,
) -> list:
    """Evaluate a model at every point of a grid.

    Args:
        task, model, tokenizer, output_dir: see `evaluate_task`.
        grid (dict): policy -> thresholds, or steps of a scheduled one.
        caches (list of `str`): `block_cache` of each; None: as the checkpoint has it.
        arguments: of `evaluate_task`.

    Returns:
        list of `Measurement`, with seconds where a point was decoded in one go. Each policy and cache is warmed up
        before the clock of its first point starts.
    """
    own = {name: value for name, value in arguments.items() if name in EVALUATION_ARGUMENTS}
    points: list[Measurement] = []
    warm: set[tuple] = set()
    for name, decoding in decodings_of(model, grid, caches=caches, **arguments).items():
        folder, kind = Path(output_dir) / name, (decoding["unmasking"], decoding.get("block_cache"))
        begins_anew = has_no_answers(folder)
        point = evaluate_task(task, model, tokenizer, folder, **{"warm_up": kind not in warm, **own}, **decoding)
        if begins_anew:
            warm.add(kind)
        points.append(replace(point, seconds=seconds_of(folder)))
    return points


def decodings_of(
    model: PreTrainedModel, grid: dict[str, list[float]], *, caches: Sequence[str | None] = (None,), **arguments: Any
) -> dict[str, dict]:
    """The points of a grid, see `sweep`: a name for each, and its arguments of `generate()`.

    Those that `arguments` has are in all of them, but a cache's not where there is none.

    Raises:
        ValueError: if one of them is wrong for the model.
    """
    common = {name: value for name, value in arguments.items() if name not in EVALUATION_ARGUMENTS}
    found = {}
    for unmasking, cache in itertools.product(grid, caches):
        for value in grid[unmasking]:
            point = {"unmasking": unmasking, number_of(unmasking): value}
            point |= {} if cache is None else {"block_cache": cache}
            decoding = {**common, **point}
            if cache == "none":
                decoding = {name: each for name, each in decoding.items() if not name.startswith("cache_refresh")}
            check_decoding(model, decoding)
            found[folder_name(point, point)] = decoding
    return found


def folder_name(decoding: dict[str, Any], names: Iterable[str]) -> str:
    """Of the evaluation at a point of a grid, which has arguments of these names."""
    return "-".join(str(decoding[name]) for name in names)


def to_table(points: list[Measurement]) -> str:
    """Markdown, a row for each point."""
    rows = ["| decoding | NFE | TPF | seconds | tokens/s | accuracy % (95% interval) |", "| --- " * 6 + "|"]
    for point in points:
        taken = "" if point.seconds is None else f"{point.seconds:.1f}"
        speed = "" if point.tokens_per_second is None else f"{point.tokens_per_second:,.0f}"
        rows.append(
            f"| {point.settings} | {point.nfe:.1f} | {point.tpf:.2f} | {taken} | {speed} | {point.accuracy_in_words} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = CommandParser(__doc__, prog="python -m dparallel.evaluation.sweep")
    add_task_argument(parser)
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument(
        "--unmasking",
        nargs="+",
        metavar="POLICY=NUMBERS",
        help="policies, each with its thresholds or steps (default: four or five thresholds each of "
        "confidence_threshold, entropy_threshold and entropy_bound)",
    )
    parser.add_argument(
        "--block_cache",
        nargs="+",
        default=[None],
        choices=BLOCK_CACHES,
        help="caches that are tried (default: the checkpoint's own alone)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/sweep"),
        help="folder for results, table, picture and all answers",
    )
    arguments = parser.parse_args()

    with plain_errors(ValueError, OSError):
        grid = parse_grid(arguments.unmasking) if arguments.unmasking else DEFAULT_GRID
        task = find_task(arguments.task)
        folder, data = arguments.output_dir, data_arguments(arguments, task)
        model, tokenizer = load_model(arguments)
        data["origin"] = origin_from(arguments, model)
        points = sweep(task, model, tokenizer, folder, grid, caches=arguments.block_cache, **data)
        if not PartialState().is_main_process:
            return
        title, lines = title_of(points, Path(arguments.model).name), curves_of(points)
        areas = "\n".join(f"- AUP of {label}: {area:.1f}" for label, area in aup(lines).items())
        report = f"{title}\n\n{to_table(points)}\n\n{areas}\n\n{AUP}\n"
        write_measurements(points, folder / RESULTS_FILE)
        (folder / "sweep.md").write_text(report, encoding="utf-8")
        plot(with_aup(lines), folder / "sweep.png", title)
        print(report)
        following = (
            f"for the model's card: python -m dparallel.hub_cards.push_model {arguments.model} user/my-model "
            f"--results {folder / RESULTS_FILE} --dry_run {folder / 'card'}"
        )
        if task.calibration_split is not None:
            following = (
                f"to save the fastest threshold that is accurate enough on problems that you do not report: python -m "
                f"dparallel.evaluation.calibrate --task {arguments.task} --model {arguments.model}"
                f"{in_words(arguments, 'data', 'limit')} --split {task.calibration_split}"
            )
        print(f"In {folder}: results.json, sweep.md and sweep.png. Next, {following}")


if __name__ == "__main__":
    main()
