"""The pictures of `make bench-report`, of entries that report.py has read. Readable at 800 pixels of width, on white.

Colours are Okabe and Ito's, which differ for colour-blind eyes too; a contestant has one colour in all pictures.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY, PALE = "#707070", "#c4c4c4"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
}
LEADER = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
WIDTH = 8  # inches, as all sizes here


class Look(NamedTuple):
    label: str
    colour: str
    marker: str
    line: str = "-"


HEADS = {
    "eager": Look("eager", BLACK, "o"),
    "torch.compile": Look("torch.compile", ORANGE, "v"),
    "onnxruntime": Look("ONNX Runtime", SKY, "D"),
    "openvino": Look("OpenVINO", PURPLE, "P"),
    "hoisted": Look("hoisted", GREEN, "^"),
    "hoisted bfloat16": Look("hoisted, bfloat16", GREEN, ">", "--"),
    "cpu": Look("cpu", BLUE, "s"),
    "cpu bfloat16": Look("cpu, bfloat16", BLUE, "X", "--"),
}
CALLS = {
    ("eager", "head"): Look("head, eager", VERMILLION, "o"),
    ("eager", "backbone"): Look("backbone, eager", ORANGE, "v"),
    ("disa_fast", "head"): Look("head, disa_fast", BLUE, "s"),
    ("disa_fast", "backbone"): Look("backbone, disa_fast", SKY, "^"),
}
PARTS = {"head": (VERMILLION, "white"), "backbone": (SKY, "black"), "other": (PALE, "black")}  # and the text on it


class End(NamedTuple):
    """Where a line ends that wants its label."""

    x: float
    y: float
    look: Look


def speed_up(steps: dict[str, list[dict]], source: str) -> Figure:
    """Speed over eager by rows, a panel for each model. steps: by model."""
    with _figure(3.8, source) as figure:
        panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
        ends: list[End] = []
        for axes, (model, chosen) in zip(panels, steps.items(), strict=True):
            axes.set(xscale="log", yscale="log", title=model, xlabel="rows of a call")
            ends = _lines(axes, chosen, lambda step, result: (step["rows"], result["over_eager"]))
            ticks = FixedLocator([step["rows"] for step in chosen])
            axes.xaxis.set(major_locator=ticks, minor_locator=NullLocator(), major_formatter="{x:.0f}")
            axes.tick_params("x", labelrotation=60)
        low, high = panels[0].get_ylim()
        ticks = FixedLocator([tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high])
        panels[0].yaxis.set(major_locator=ticks, minor_locator=NullLocator(), major_formatter="{x:g}x")
        panels[0].set_ylabel("speed over eager PyTorch")
        _label_ends(panels[-1], ends, gap=0.075)
    return figure


def roofline(steps: list[dict], source: str) -> Figure:
    """GFLOP/s by FLOP per byte, of the hoisted loop's work whoever runs, under the roofs of the machine; one model's steps."""
    limits = {name: statistics.median(step["limits"][name] for step in steps) / 1e9 for name in steps[0]["limits"]}
    peak = limits["multiply-add"]
    with _figure(5, source) as figure:
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of weights", ylabel="GFLOP/s of the hoisted loop's work")
        axes.set_title(f"{steps[0]['model']}: a denoising step by number of rows, and what the machine allows")
        ends = _lines(axes, steps, lambda step, result: (result["flops_per_byte"], result["GFLOP/s"]))
        left, right = axes.get_xlim()
        left /= 4  # room for what is written along the slopes
        right = max(right, 4 * peak / limits["float32"])
        bottom = min(0.7 * axes.get_ylim()[0], left * limits["float32"])
        small = {"fontsize": 8, "color": GREY}
        for name, line, anchor, away in (("float32", "-", "top", 1 / 1.1), ("bfloat16", "--", "bottom", 1.1)):
            slope = limits[name]
            axes.plot([left, peak / slope, right], [left * slope, peak, peak], line, color=GREY, linewidth=1.2)
            tilt = {"rotation": math.degrees(math.atan(slope)), "transform_rotates_text": True, "rotation_mode": "anchor"}
            axes.text(left, left * slope * away, f"  {name}: {slope:.0f} GB/s", va=anchor, **tilt, **small)
        axes.text(1.2 * peak / limits["float32"], 1.04 * peak, f"{peak:.0f} GFLOP/s", va="bottom", **small)
        for i, step in enumerate(steps):
            lowest = min(step["results"].values(), key=lambda result: result["GFLOP/s"])
            at = lowest["flops_per_byte"], lowest["GFLOP/s"]
            text = f"{step['rows']}" if i else f"{step['rows']} rows"
            axes.annotate(text, at, (0, -7), textcoords="offset points", ha="center", va="top", **small)
        axes.set(xlim=(left, right), ylim=(bottom, max(1.6 * peak, axes.get_ylim()[1])))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        _label_ends(axes, ends, gap=0.05)
    return figure


def share_of_time(images: dict[str, dict], source: str) -> Figure:
    """Time of an image divided into parts, eager and disa_fast; each image's eager time is 1. images: by name."""
    with _figure(0.9 + 0.72 * len(images), source) as figure:
        axes = figure.subplots()
        places: dict[float, str] = {}
        for i, (name, image) in enumerate(images.items()):
            for contestant, place in (("eager", 2.5 * i), ("disa_fast", 2.5 * i + 1)):
                result = image["results"].get(contestant)
                if result is None:
                    continue
                places[place] = f"{name}, eager" if contestant == "eager" else contestant
                start, whole = 0.0, sum(result["parts"].values())
                for part, (colour, letters) in PARTS.items():
                    share = result["parts"][part] / whole
                    width = share / result["over_eager"]
                    axes.barh(place, width, 0.92, start, color=colour, label=part if place == 0 else None)
                    if width > 0.045:
                        text = f"{100 * share:.0f} %"
                        axes.text(start + width / 2, place, text, ha="center", va="center", color=letters, fontsize=8)
                    start += width
                if contestant != "eager":
                    axes.text(start + 0.01, place, f"{result['over_eager']:.2f}x", va="center", weight="bold")
        axes.set_yticks(list(places), list(places.values()))
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set(xlim=(0, 1.005), xlabel="time of an image, eager PyTorch = 1")
        axes.tick_params("y", length=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(PARTS), frameon=False)
    return figure


def ar_steps(images: dict[str, dict], source: str) -> Figure:
    """Seconds of head and backbone by AR step, and below the denoising steps T(k) of the schedule. images: by name."""
    across = 2
    down = math.ceil(len(images) / across)
    with _figure(4.2 * down, source) as figure:
        panels = figure.subplots(2 * down, across, squeeze=False, height_ratios=[3, 1] * down)
        pairs = [(panels[2 * i, j], panels[2 * i + 1, j]) for i in range(down) for j in range(across)]
        for axes in itertools.chain(*pairs[len(images) :]):
            axes.remove()
        for (upper, lower), (name, image) in zip(pairs, images.items(), strict=False):
            taken, k = image["ar_steps"], [step["k"] for step in image["ar_steps"]]
            ends = []
            for (contestant, part), look in CALLS.items():
                seconds = [step["seconds"][contestant][part] for step in taken if contestant in step["seconds"]]
                if any(seconds):  # an xAR is all head
                    upper.plot(k, seconds, color=look.colour, marker=look.marker if len(k) < 10 else None)
                    ends.append(End(k[-1], seconds[-1], look))
            rows = sorted({step["rows"] for step in taken})
            span = " to ".join(map(str, rows[:: len(rows) - 1 or 1]))
            upper.set(title=f"{name}, {span} rows", ylabel="seconds", ylim=(0, None))
            upper.tick_params("x", labelbottom=False)
            lower.step(k, [step["T"] for step in taken], where="mid", color=BLACK)
            lower.set(xlabel="AR step k", ylabel="T(k)", xlim=upper.get_xlim(), ylim=(0, None))
            for axes in (upper, lower):
                axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            _label_ends(upper, ends, gap=0.085)
    return figure


@contextmanager
def _figure(height: float, source: str) -> Iterator[Figure]:
    """A figure of our style, with where its numbers come from in small print under it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, height), dpi=200, layout="constrained")
        figure.supxlabel(source, x=0.01, ha="left", fontsize=7, color=GREY)
        yield figure


def _lines(axes: Axes, steps: list[dict], point: Callable[[dict, dict], tuple[float, float]]) -> list[End]:
    """A line for every contestant, of point(step, its result) of the steps that it took part in."""
    ends = []
    for name, look in HEADS.items():
        points = [point(step, step["results"][name]) for step in steps if name in step["results"]]
        if points:
            axes.plot(*zip(*points, strict=True), look.line, color=look.colour, marker=look.marker)
            ends.append(End(*points[-1], look))
    return ends


def _label_ends(axes: Axes, ends: list[End], gap: float) -> None:
    """Labels right of the axes, at least `gap` of its height apart, and a thin line to each from where its line ends.

    After the limits are set: they decide where labels lie.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end.y)
    heights = [float(to_axes.transform((end.x, end.y))[1]) for end in ends]
    for end, height in zip(ends, apart(heights, gap), strict=True):
        axes.annotate(
            end.look.label,
            (end.x, end.y),
            (1.08, height),
            textcoords=axes.transAxes,
            va="center",
            color=[0.7 * part for part in to_rgb(end.look.colour)],  # thin on white, letters have to be darker
            annotation_clip=False,
            arrowprops=LEADER | {"color": end.look.colour, "linestyle": end.look.line},
        )


def apart(heights: list[float], gap: float) -> list[float]:
    """Ascending heights at least `gap` from each other: moved up where they are not, and down again where that went beyond 1."""
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    limit = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    return heights
