"""Find the fastest threshold that costs no more accuracy than allowed, and save it with the checkpoint.

Accuracy is compared with that of one token a pass, problem by problem, or with `--bar`. The 95% interval of the
difference is printed; where it reaches below the margin, a warning says that the problems are too few to tell, and the
threshold is written all the same. Calibrate on problems that you do not report.

    python -m dparallel.evaluation.calibrate --task gsm8k --split train --limit 500 --model runs/llada/merged \\
        --unmasking entropy_threshold --margin 0.01
"""

import math
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.hub_cards.measurements import RESULTS_FILE, Difference, Measurement, fastest, paired_difference

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
from .evaluation import verdicts_of, write_measurements
from .sweep import DEFAULT_GRID, decodings_of, folder_name, number_of, sweep, to_table
from .tasks import Task


def calibrate(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    unmasking: str,
    thresholds: list[float],
    *,
    margin: float = 0.01,
    bar: float | None = None,
    **arguments: Any,
) -> tuple[Measurement | None, list[Measurement]]:
    """Of these thresholds the fastest whose accuracy is at most `margin` below that of one token a pass, without a
    cache. The thresholds are tried with the cache that the checkpoint, or `arguments`, has.

    Args:
        task, model, tokenizer, output_dir: see `evaluate_task`.
        unmasking (`str`), thresholds (list of `float`): the policy (a scheduled one: steps).
        margin (`float`): of accuracy, from 0 to 1.
        bar (`float`, *optional*): the accuracy of slow decoding, where it is known already.
        arguments: of `evaluate_task`.

    Returns:
        the chosen `Measurement` (None if no threshold is accurate enough), and all of them, slow decoding first.

    Raises:
        ValueError: for a margin or bar out of range.
    """
    for name, value in (("margin", margin), ("bar", bar)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"`{name}={value!r}` is not allowed: it must be from 0 to 1.")
    points, candidates = [], {unmasking: thresholds}
    decodings_of(model, candidates, **arguments)  # a wrong one is refused now, and not after slow decoding
    if bar is None:
        steps = arguments.get("max_new_tokens") or task.max_new_tokens
        slow = {"confidence": [steps]}
        points = sweep(task, model, tokenizer, Path(output_dir) / "slow", slow, caches=["none"], **arguments)
        bar = points[0].accuracy
        if not bar:
            raise ValueError(
                f"No answer of {points[0].num_examples} is right at one token a pass, so accuracy cannot choose a "
                f"threshold: the task may not be what the model was trained for."
            )
    fast = sweep(task, model, tokenizer, output_dir, candidates, **arguments)
    chosen = fastest(fast, bar - margin - 1e-9)  # rounding must not decide
    return chosen, [*points, *fast]


def difference_to_slow(
    output_dir: str | Path, chosen: Measurement, points: list[Measurement], bar: float | None = None
) -> Difference:
    """How much more accurate the chosen threshold is than one token a pass, with its 95% interval: on the same
    problems, or, where only a `bar` is known, from the interval of the threshold's own accuracy. Arguments as
    `calibrate` takes and returns them."""
    if bar is not None:
        return Difference(*(accuracy - bar for accuracy in (chosen.accuracy, *chosen.interval)))
    folders = [Path(output_dir) / "slow" / folder_name(points[0].decoding, ("unmasking", "steps", "block_cache"))]
    folders += [
        Path(output_dir) / folder_name(chosen.decoding, ("unmasking", number_of(chosen.decoding["unmasking"])))
    ]
    slow, fast = map(verdicts_of, folders)
    return paired_difference(fast, slow)


def warning_of_noise(difference: Difference, margin: float, count: int) -> str | None:
    """What to say where the difference may be a loss of more than the margin."""
    if difference.low >= -margin:
        return None
    words = (
        f"Warning: `margin={margin!r}`, {100 * margin:g} points, is inside the noise: on these {count} problems up to "
        f"{-100 * difference.low:.1f} points may be lost."
    )
    room = margin + difference.mean
    if room <= 0:
        return f"{words} Take a threshold that is further inside the margin, or allow more."
    wanted = math.ceil(count * ((difference.mean - difference.low) / room) ** 2)
    return f"{words} About {wanted:,} problems (--limit) could tell, or allow more (--margin)."


def main() -> None:
    parser = CommandParser(__doc__, prog="python -m dparallel.evaluation.calibrate")
    add_task_argument(parser)
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument(
        "--unmasking",
        default="entropy_threshold",
        choices=sorted(DEFAULT_GRID),
        help="policy whose threshold is chosen",
    )
    parser.add_argument(
        "--thresholds", type=float, nargs="+", help="thresholds that are tried (default: four or five of each policy)"
    )
    margin_help = (
        "share of accuracy that may be lost, 0.01 for a point; where the 95%% interval of the difference reaches "
        "below it, there is a warning, and the threshold is written all the same"
    )
    parser.add_argument("--margin", type=float, default=0.01, help=margin_help)
    parser.add_argument(
        "--bar", type=float, help="accuracy of one token a pass, from 0 to 1, if you know it (default: it is measured)"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/calibration"), help="folder for the results and all answers"
    )
    arguments = parser.parse_args()

    with plain_errors(ValueError, OSError):
        if arguments.adapter or not (Path(arguments.model) / "config.json").exists():
            wrong = f"adapter={arguments.adapter!r}" if arguments.adapter else f"model={arguments.model!r}"
            raise ValueError(
                f"`{wrong}` is not allowed: a merged model's folder is wanted, to write the threshold there."
            )
        task = find_task(arguments.task)
        data = data_arguments(arguments, task)
        model, tokenizer = load_model(arguments)
        data["origin"] = origin_from(arguments, model)
        chosen, points = calibrate(
            task, model, tokenizer, arguments.output_dir, arguments.unmasking,
            arguments.thresholds or DEFAULT_GRID[arguments.unmasking], margin=arguments.margin, bar=arguments.bar,
            **data,
        )  # fmt: skip
        if not PartialState().is_main_process:
            return
        write_measurements(points, arguments.output_dir / RESULTS_FILE)
        print(f"{to_table(points)}\n\nIn {arguments.output_dir}: results.json, and all answers.")
        if chosen is None:
            best = max(point.accuracy for point in points if "threshold" in point.decoding)
            wanted = (points[0].accuracy if arguments.bar is None else arguments.bar) - arguments.margin
            raise ValueError(
                f"No threshold was accurate enough, so nothing was written: the best has {100 * best:.1f}%, "
                f"and {100 * wanted:.1f}% is wanted with `margin={arguments.margin!r}`. "
                f"Try stricter `--thresholds`, a larger `--margin`, or more problems (`--limit`)."
            )
        difference = difference_to_slow(arguments.output_dir, chosen, points, arguments.bar)
        against = "one token a pass" if arguments.bar is None else f"the bar of {100 * arguments.bar:g}%"
        how = "95% interval, paired" if arguments.bar is None else "95% interval of this sample"
        print(f"{chosen.settings}: {difference} points against {against} ({how}; {chosen.num_examples} problems).")
        if (warning := warning_of_noise(difference, arguments.margin, chosen.num_examples)) is not None:
            print(warning, file=sys.stderr)
        name = number_of(arguments.unmasking)
        settings = {"threshold": None, "steps": None, name: chosen.decoding[name]}
        model.generation_config.update(unmasking=arguments.unmasking, **settings)
        model.generation_config.save_pretrained(arguments.model)
        value = f"{chosen.decoding[name]:g}"
        print(
            f"{arguments.unmasking}, {name} {value} is in {arguments.model}/generation_config.json. Next, to measure "
            f"it on the split that published results are of: python -m dparallel.evaluation.sweep "
            f"--task {arguments.task} --model {arguments.model}{in_words(arguments, 'data')} --unmasking "
            f"{arguments.unmasking}={value}"
        )


if __name__ == "__main__":
    main()
