"""Draw a report's pictures: memory by purpose, gradient magnitudes, activation ranges, the scaler's diary."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ampscope.look import BLUE, FAINT, GOLD, INK, STYLES, VERMILION, legend_below, picture

Target = Path | io.BytesIO  # a PNG file, or a buffer for the SVG of a page
PARTS = ("parameters", "gradients", "optimizer_state", "activations", "weight_copies")


def memory_picture(ledger: list[dict[str, Any]], path: Target) -> None:
    """Draw stacked bars of the memory that stays FP32 and of the memory that AMP changes."""
    with picture(path, 9, 1.9 + 0.7 * len(ledger)) as figure:
        axes = figure.add_subplot()
        ends = [0.0] * len(ledger)
        for part, (color, _, _, hatch) in zip(PARTS, STYLES, strict=False):
            sizes = [(row[part] or 0) / 2**20 for row in ledger]
            axes.barh(
                range(len(ledger)),
                sizes,
                left=ends,
                height=0.55,
                color=color,
                hatch=hatch,
                edgecolor="white",
                label=part.replace("_", " "),
            )
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        for place, (end, row) in enumerate(zip(ends, ledger, strict=True)):
            peak = "peak not measured" if row["peak"] is None else f"peak {row['peak'] / 2**20:,.0f} MB"
            axes.text(end, place, f"  {peak}", va="center")
        axes.set_yticks(range(len(ledger)), [row["precision"] for row in ledger])
        axes.set(
            title="What one training update holds",
            xlim=(0, 1.2 * max(ends) or 1),
            xlabel="MB (gradients come as activations go, so the peak is not the sum)",
        )
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)


def magnitude_picture(histogram: dict[str, dict[int, int]], path: Target) -> None:
    """Draw gradient magnitudes against the ranges of float16 and bfloat16."""
    half = torch.finfo(torch.float16)
    brain = torch.finfo(torch.bfloat16)
    # Half of the smallest subnormal number rounds to zero, everything above it to that number or more.
    smallest = math.log2(half.smallest_normal * half.eps / 2)
    tiny = math.log2(half.tiny)
    largest = math.log2(half.max)
    span = range(-45, 20)
    tallest = 1.0
    with picture(path, 9, 5) as figure:
        axes = figure.add_subplot()
        for group, color, line in (("parameter", BLUE, "-"), ("activation", VERMILION, "--")):
            counts: Counter = Counter()
            for exponent, count in histogram[group].items():  # values beyond the picture count at its edge
                counts[min(max(exponent, span[0]), span[-2])] += count
            shares = [100 * counts[exponent] / max(1, counts.total()) for exponent in span[:-1]]
            axes.stairs(shares, span, color=color, linestyle=line, linewidth=1.8, label=f"gradients of {group}s")
            axes.stairs(shares, span, color=color, alpha=0.15, fill=True)
            tallest = max(tallest, *shares)
        axes.axvspan(smallest, tiny, color=FAINT, alpha=0.25, linewidth=0)
        for border in (smallest, largest):
            axes.axvline(border, color=INK, linewidth=1.2)
        for place, text in (
            ((span[0] + smallest) / 2, f"zero in float16\n(below 2^{smallest:.0f})"),
            ((smallest + tiny) / 2, "float16,\nsubnormal"),
            ((tiny + largest) / 2, f"float16, full precision\n(2^{tiny:.0f} to {half.max:,.0f})"),
        ):
            axes.text(place, 1.24 * tallest, text, ha="center", va="top", fontsize=9)
        arrow = {"arrowstyle": "->", "color": INK}
        axes.annotate("", (smallest - 0.3, 0.55 * tallest), (smallest - 16.3, 0.55 * tallest), arrowprops=arrow)
        axes.text(smallest - 16, 0.57 * tallest, "a loss scale of\n2^16 moves\nall this far", fontsize=9)
        axes.set(
            xlim=(span[0], span[-1]),
            ylim=(0, 1.26 * tallest),
            ylabel="% of nonzero values",
            title="Gradient magnitudes against float16",
            xlabel=f"log2 of the magnitude (bfloat16: {math.log2(brain.tiny):.0f} to {math.log2(brain.max):.0f})",
        )
        legend_below(axes, 2, fontsize=9)


def activation_picture(activations: list[dict[str, Any]], path: Target, most: int = 40) -> None:
    """Draw the smallest to the largest nonzero activation of each module, against the formats' limits.

    Of more modules than `most`, draw those with the largest values.
    """
    measured = [row for row in activations if row["largest"]]
    highest = {id(row) for row in sorted(measured, key=lambda row: -row["largest"])[:most]}
    rows = [row for row in measured if id(row) in highest]
    with picture(path, 9, 1.8 + 0.19 * len(rows)) as figure:
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            ends = [math.log2(row["smallest"]), math.log2(row["largest"])]
            axes.plot(ends, [place, place], color=BLUE, linewidth=3, solid_capstyle="butt")
        for name, dtype, color, line in (
            ("float16", torch.float16, VERMILION, "-"),
            ("float8 e4m3", torch.float8_e4m3fn, INK, ":"),
            ("float8 e5m2", torch.float8_e5m2, GOLD, "--"),
        ):
            info = torch.finfo(dtype)
            for border, label in ((math.log2(info.max), name), (math.log2(info.smallest_normal), None)):
                axes.axvline(border, color=color, linestyle=line, label=label)
        axes.set_yticks(range(len(rows)), [row["name"][-36:] or row["kind"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set(
            title="Activations against narrow formats", xlabel="log2 of the magnitude, smallest (not 0) to largest"
        )
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)


def diary_picture(metrics: list[dict[str, Any]], path: Target) -> None:
    """Draw the loss scale of each update, from the skips and the ends of epochs, and the skipped updates."""
    skips = {skip["update"]: skip["scale"] for line in metrics for skip in line.get("skips") or []}
    scales = skips | {  # an epoch's entry has the scale of the next update
        line["updates"] + 1: line["loss_scale"] for line in metrics if line.get("updates") and line.get("loss_scale")
    }
    with picture(path, 9, 3.6) as figure:
        axes = figure.add_subplot()
        axes.step(sorted(scales), [scales[update] for update in sorted(scales)], color=BLUE)
        axes.plot(list(skips), list(skips.values()), "v", color=VERMILION, label="skipped")
        axes.set_xscale("log")  # the search for the scale happens in the first updates
        axes.set_yscale("log", base=2)
        axes.set(xlabel="update", ylabel="loss scale", title=f"Loss scale, and the {len(skips)} updates skipped")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.legend()
