"""A picture of measurements: accuracy against forward passes, and against seconds.

Nothing is computed anew. The picture lies beside the file, under its name, unless `--output` says where. A policy has
the same colour in every picture.

    python -m dparallel.evaluation.plot runs/sweep/results.json
    python -m dparallel.evaluation.plot examples/word_problems/student/sweep.json --title "the student"
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.hub_cards.measurements import Measurement, load_measurements

from .metrics import accuracy_under_parallelism

# Of a policy, in every picture. A policy of one's own is black.
POLICY_COLOURS = {
    "entropy_threshold": "tab:blue", "confidence_threshold": "tab:orange", "entropy_bound": "tab:green",
    "confidence_factor": "tab:red", "learned_filter": "tab:purple", "confidence": "tab:brown", "entropy": "tab:pink",
    "margin": "tab:olive", "random": "tab:cyan", "leftmost": "tab:gray",
}  # fmt: skip
CACHE_LINES = {"none": "-", "prefix": ":", "dual": "--", "exact": "-."}
SHOWN = {"nfe": "forward passes for an answer (NFE)", "seconds": "seconds for all answers"}
SHOWN_POINTS_OF_ACCURACY = 30  # below the best; what is further below would press the rest together
STEP = 4  # pixels between the places of a line at which a label is said to cross it
DISTANCES, ANGLES = np.arange(3, 63, 3), np.arange(0, 2 * np.pi, np.pi / 8)  # from a point to its label; in points
TICK_SIZE, LABEL_SIZE, NUMBER_SIZE = 9, 8, 6  # in points


class Curve(NamedTuple):
    """A line of a picture: `points` in their order along it, and how it is drawn, as matplotlib says it."""

    label: str
    points: list[Measurement]
    colour: str
    line: str = "-"


def curves_of(points: list[Measurement]) -> list[Curve]:
    """A curve for each policy and cache (and model, where another was measured for comparison), the fastest point
    first, in the policy's colour."""
    lines = {}
    for point in points:
        settings = _settings(point)
        policy, cache = settings.get("unmasking", "as shipped"), settings.get("block_cache", "none")
        lines.setdefault((point.model, policy, cache), []).append(point)
    curves = []
    for (model, policy, cache), line in lines.items():
        label = ", ".join([*([model] if model else []), policy.replace("_", " ")])
        label += "" if cache == "none" else f", {cache} cache"
        line = sorted(line, key=lambda point: point.nfe)
        curves.append(Curve(label, line, POLICY_COLOURS.get(policy, "black"), CACHE_LINES[cache]))
    return curves


def _settings(point):
    """Of its decoding, whoever set them."""
    return {**(point.resolved_decoding or {}), **point.decoding}


def aup(curves: Sequence[Curve]) -> dict[str, float]:
    """AUP of each curve, by its label; the best accuracy is that of all points."""
    best = max(point.accuracy for curve in curves for point in curve.points)
    return {curve.label: aup_of(curve.points, best) for curve in curves}


def aup_of(points: Sequence[Measurement], best: float) -> float:
    """AUP of points, where the best accuracy of any method on the task is this one, from 0 to 1."""
    return accuracy_under_parallelism(
        [point.tpf for point in points], [100 * point.accuracy for point in points], 100 * best
    )


def without_seconds(curves: Sequence[Curve]) -> list[Curve]:
    """The same curves, to be drawn against passes alone: several processes may have shared a GPU."""
    return [curve._replace(points=[replace(point, seconds=None) for point in curve.points]) for curve in curves]


def with_aup(curves: Sequence[Curve]) -> list[Curve]:
    """The same curves, with AUP in their labels."""
    areas = aup(curves)
    return [curve._replace(label=f"{curve.label}\nAUP {areas[curve.label]:.0f}") for curve in curves]


def title_of(points: Sequence[Measurement], model: str | None = None) -> str:
    """What the points of a sweep have in common."""
    first = points[0]
    words = [model or first.checkpoint, f"{first.task}{first.shots}", f"{first.num_examples} examples", first.hardware]
    return ", ".join([word for word in words if word] + [first.date])


def shades(colour: str, count: int) -> list[tuple]:
    """So many shades of a colour, from a light one to a dark one."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("shades", ["white", colour, "black"])
    return [scale(share) for share in np.linspace(0.4, 0.8, count)]


def plot(curves: Sequence[Curve], path: str | Path, title: str, bar: float | None = None):
    """A PNG: accuracy with its 95% intervals against NFE, and against seconds if all points have them.

    A curve's label stands at one of its ends. Beside each point stands its threshold or its number of steps.

    Args:
        curves (list of `Curve`): each of at least one point.
        path (`str` or `Path`): the file; title (`str`): what stands above.
        bar (`float`, *optional*): an accuracy, from 0 to 1, that is marked.
    """
    from matplotlib.figure import Figure  # not pyplot, which may look for a display

    shown = dict(SHOWN)
    if any(point.seconds is None for curve in curves for point in curve.points):
        del shown["seconds"]
    size = (6.5 * len(shown), 6) if len(shown) > 1 else (10, 6.5)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (quantity, label) in zip(panels, shown.items(), strict=True):
        _draw_curves(axes, curves, quantity)
        if bar is not None:
            axes.axhline(100 * bar, color="0.5", linewidth=0.8, linestyle=":")
        axes.set(xlabel=label, ylabel="accuracy %, with its 95% interval")
    figure.draw_without_rendering()  # from here on, panels stay where they are
    figure.set_layout_engine("none")
    for axes, quantity in zip(panels, shown, strict=True):
        _write_labels(axes, curves, quantity)
    figure.savefig(path)


def _draw_curves(axes, curves, quantity):
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for curve in curves:
        x, y = _positions(curve, quantity)
        ends = 100 * np.array([point.interval for point in curve.points])
        errors = np.abs(ends - y[:, None]).T
        axes.errorbar(x, y, errors, fmt="none", ecolor=curve.colour, elinewidth=1, alpha=0.5)
        axes.plot(x, y, color=curve.colour, linestyle=curve.line, marker="o", markersize=4)
    best = [max(100 * point.accuracy for point in curve.points) for curve in curves]
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.08)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, min(max(best) - SHOWN_POINTS_OF_ACCURACY, min(best) - 3)), min(top, 102))
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 3, 5, 7)) if high > 8 * low else MaxNLocator(8, steps=[1, 2, 5, 10])
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=TICK_SIZE)
    axes.grid(alpha=0.3)


def _positions(curve, quantity):
    """Coordinates of a curve's points."""
    return np.array([(getattr(point, quantity), 100 * point.accuracy) for point in curve.points]).T


# --- labels ----------------------------------------------------------------------------------------------------------


def _number(point):
    """What makes a policy fast or slow at this point: "0.1", or nothing where it is not known."""
    settings = _settings(point)
    number = settings.get("threshold", settings.get("steps"))
    return "" if number is None else f"{number:g}"


def _write_labels(axes, curves, quantity):
    """Curves' names at one of their ends, then the points' numbers, each where it covers least."""
    in_pixels = [axes.transData.transform(_positions(curve, quantity).T) for curve in curves]
    covered = [_between(*pair) for line in in_pixels for pair in itertools.pairwise(line)]
    for curve in curves:
        for at, point in zip(_positions(curve, quantity)[0], curve.points, strict=True):
            covered.append(_between(*axes.transData.transform([(at, 100 * end) for end in point.interval])))
    covered = np.concatenate(covered)
    marker = np.full(2, 5 * axes.figure.dpi / 72)
    taken = [_box(corner, marker) for line in in_pixels for corner in line]
    for curve, line in zip(curves, in_pixels, strict=True):
        seen = [corner for corner in line[::-1] if axes.bbox.contains(*corner)]
        ends = [end for end in (line[-1], line[0]) if axes.bbox.contains(*end)] or seen[:1]
        _write(axes, curve.label, ends, curve.colour, LABEL_SIZE, taken, covered)
    for curve, line in zip(curves, in_pixels, strict=True):
        for corner, point in zip(line, curve.points, strict=True):
            if axes.bbox.contains(*corner) and (number := _number(point)):
                _write(axes, number, (corner,), curve.colour, NUMBER_SIZE, taken, covered)


def _write(axes, text, anchors, colour, fontsize, taken, covered):
    """Write a text beside one of the anchors, the first if all else is equal, in a box that overlaps none of those in
    `taken`, to which it is added, and as little as possible of what is `covered` by lines. All are in pixels."""
    point = axes.figure.dpi / 72
    style = {"color": colour, "fontsize": fontsize, "ha": "center", "va": "center", "linespacing": 1.0}
    probe = axes.text(0, 0, text, **style)
    size = np.array(probe.get_window_extent().size)
    probe.remove()
    distance, angle = (each.ravel() for each in np.meshgrid(DISTANCES, ANGLES, indexing="ij"))
    away = np.column_stack([np.cos(angle), np.sin(angle)]) * (size / 2 + distance[:, None] * point)
    distance, boxes = (
        np.tile(distance, len(anchors)),
        np.concatenate([_box(anchor + away, size) for anchor in anchors]),
    )
    low, high = boxes[:, 0], boxes[:, 1]
    near = covered[((covered > low.min(0)) & (covered < high.max(0))).all(axis=1)]
    crossed = ((near > low[:, None]) & (near < high[:, None])).all(axis=-1).sum(axis=1)
    others = np.array(taken)
    overlap = np.minimum(high[:, None], others[:, 1]) - np.maximum(low[:, None], others[:, 0])
    overlap = overlap.clip(0).prod(axis=-1).sum(axis=1)
    is_outside = ((low < axes.bbox.min) | (high > axes.bbox.max)).any(axis=1)
    best = np.argmin(distance + 3 * STEP * crossed + 100 * overlap + 1e6 * is_outside)
    taken.append(boxes[best])
    leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
    axes.annotate(
        text, axes.transData.inverted().transform(anchors[best // len(away)]), away[best % len(away)],
        textcoords="offset pixels", **style, arrowprops=leader if distance[best] > 9 else None,
    )  # fmt: skip


def _between(first, last):
    """Pixels along a straight line, in steps."""
    count = int(np.linalg.norm(last - first) / STEP) + 2
    return first + np.linspace(0, 1, count)[:, None] * (last - first)


def _box(centres, size):
    """The lower left and the upper right corner of each box: `(count, 2, 2)`."""
    return np.stack([centres - size / 2, centres + size / 2], axis=-2)


def main():
    parser = CommandParser(__doc__, prog="python -m dparallel.evaluation.plot")
    parser.add_argument("results", type=Path, help="what a sweep or an evaluation wrote: results.json")
    parser.add_argument("--output", type=Path, help="where the picture goes (default: beside the results, as .png)")
    parser.add_argument(
        "--title",
        help="what stands above it (default: checkpoint, task, examples, hardware and date of the first point)",
    )
    arguments = parser.parse_args()
    output = arguments.output or arguments.results.with_suffix(".png")
    with plain_errors(ValueError, OSError):
        points = load_measurements(arguments.results)
        if not points:
            raise ValueError(f"`results={str(arguments.results)!r}` is not allowed: it holds no measurement.")
        plot(with_aup(curves_of(points)), output, arguments.title or title_of(points))
    print(f"In {output}: accuracy at {len(points)} points.")


if __name__ == "__main__":
    main()
