"""Accuracy against forward passes and seconds, over policies, thresholds and caches.

    python -m dparallel.evaluation.sweep --task gsm8k --model user/repo --limit 200 \\
        --unmasking entropy_threshold=0.1,0.3,0.5 confidence_threshold=0.8,0.9 --block_cache none dual

Writes `results.json` (every point, as cards read it), `sweep.md` and `sweep.png`. After a kill it goes on where it
was; a point that was decoded in two parts has no seconds.
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

from .command_line import add_data_arguments, add_model_arguments, data_arguments, find_task, load_model, origin_from
from .evaluation import check_decoding, evaluate_task, seconds_of, write_measurements
from .metrics import accuracy_under_parallelism
from .tasks import Task

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
        list of `Measurement`, with seconds where a point was decoded in one go.
    """
    own = {name: value for name, value in arguments.items() if name in EVALUATION_ARGUMENTS}
    points = []
    for name, decoding in decodings_of(model, grid, caches=caches, **arguments).items():
        folder = Path(output_dir) / name
        point = evaluate_task(task, model, tokenizer, folder, **own, **decoding)
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


def curves(points: list[Measurement]) -> dict[str, list]:
    """Points by policy and cache, the fastest first."""
    found = {}
    for point in points:
        label = point.decoding["unmasking"].replace("_", " ")
        cache = point.decoding.get("block_cache")
        found.setdefault(label if cache in (None, "none") else f"{label}, {cache} cache", []).append(point)
    return {label: sorted(line, key=lambda point: point.nfe) for label, line in found.items()}


def aup(lines: dict[str, list[Measurement]]) -> dict[str, float]:
    """AUP of each curve, by its name; the best accuracy is that of all points."""
    best = 100 * max(point.accuracy for line in lines.values() for point in line)
    return {
        label: accuracy_under_parallelism([p.tpf for p in line], [100 * p.accuracy for p in line], best)
        for label, line in lines.items()
    }


def to_table(points: list[Measurement]) -> str:
    rows = ["| decoding | NFE | TPF | seconds | accuracy % (95% interval) |", "| --- " * 5 + "|"]
    for point in points:
        taken = "" if point.seconds is None else f"{point.seconds:.1f}"
        rows.append(f"| {point.settings} | {point.nfe:.1f} | {point.tpf:.2f} | {taken} | {point.accuracy_in_words} |")
    return "\n".join(rows)


def plot(lines: dict[str, list[Measurement]], path: str | Path, title: str, bar: float | None = None) -> None:
    """A PNG: accuracy against NFE, and against seconds if all points have them; AUP in the legend.

    Args:
        lines (`dict[str, list[Measurement]]`): the points of each curve, by its name.
        bar (`float`, *optional*): an accuracy that is marked.
    """
    from cycler import cycler
    from matplotlib.figure import Figure

    areas, points = aup(lines), [point for line in lines.values() for point in line]
    shown = {"nfe": "forward passes for an answer (NFE)", "seconds": "seconds for all answers"}
    if any(point.seconds is None for point in points):
        del shown["seconds"]
    best = 100 * max(point.accuracy for point in points)
    figure = Figure(figsize=(5.5 * len(shown), 5) if len(shown) > 1 else (8, 5.5), layout="constrained")
    panels: Any = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, label) in zip(panels, shown.items(), strict=True):
        axes.set_prop_cycle(
            cycler(linestyle=["-", "--", ":"]) * cycler(color=["tab:blue", "tab:orange", "tab:green", "tab:red"])
        )
        for curve, line in lines.items():
            values = [getattr(point, name) for point in line], [100 * point.accuracy for point in line]
            axes.plot(*values, marker="o", markersize=4, label=f"{curve}, AUP {areas[curve]:.0f}")
        if bar is not None:
            axes.axhline(100 * bar, color="0.5", linewidth=0.8, linestyle=":")
        axes.set(xlabel=label, ylabel="accuracy %", xscale="log")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], best - 40))  # what is further below would press the rest together
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=8)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2 * len(shown), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = CommandParser(__doc__, prog="python -m dparallel.evaluation.sweep")
    parser.add_argument("--task", required=True, help="gsm8k, math, mbpp, humaneval, or path.py:NAME")
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--unmasking", nargs="+", metavar="POLICY=NUMBERS", help="default: three policies")
    choices = ["none", "prefix", "dual"]
    parser.add_argument("--block_cache", nargs="+", default=[None], choices=choices, help="default: the checkpoint's")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sweep"))
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
        first = points[0]
        where = f"{first.hardware}, {first.date}"
        title = f"{Path(arguments.model).name}, {first.task}{first.shots}, {first.num_examples} examples, {where}"
        lines = curves(points)
        areas = "\n".join(f"- AUP of {label}: {area:.1f}" for label, area in aup(lines).items())
        report = f"{title}\n\n{to_table(points)}\n\n{areas}\n"
        write_measurements(points, folder / RESULTS_FILE)
        (folder / "sweep.md").write_text(report, encoding="utf-8")
        plot(lines, folder / "sweep.png", title)
        print(report)


if __name__ == "__main__":
    main()
