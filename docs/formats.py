"""Draw docs/formats.png: the bits, the range and the spacing of the four float formats, to scale.

Everything comes from torch.finfo, except TF32, which is not a dtype of PyTorch: NVIDIA gives it float32's exponent and
float16's fraction. Knows nothing of training.

    python docs/formats.py
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ampscope.look import FAINT, INK, STYLES, picture  # noqa: E402


@dataclass(frozen=True)
class Format:
    """A binary float format: the number of bits of exponent and of fraction, besides one sign bit."""

    name: str
    exponent: int
    fraction: int

    @property
    def eps(self) -> float:
        """Return the distance from 1 to the next number."""
        return 2.0**-self.fraction

    @property
    def largest(self) -> float:
        return (2 - self.eps) * 2.0 ** (2 ** (self.exponent - 1) - 1)

    @property
    def normal(self) -> float:
        """Return the smallest number that has all bits of its fraction."""
        return 2.0 ** (2 - 2 ** (self.exponent - 1))

    @property
    def smallest(self) -> float:
        return self.normal * self.eps


def formats() -> list[Format]:
    """Return float32, TF32, bfloat16 and float16; check the three of PyTorch against torch.finfo."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        limits = torch.finfo(dtype)
        fraction = round(-math.log2(limits.eps))
        one = Format(str(dtype).removeprefix("torch."), limits.bits - 1 - fraction, fraction)
        assert (one.largest, one.normal, one.eps) == (limits.max, limits.tiny, limits.eps)
        found.append(one)
    single, brain, half = found
    return [single, Format("TF32", single.exponent, half.fraction), brain, half]


def power_of_two(exponent: int) -> str:
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) if exponent else "1"


def bits_panel(axes: Axes, rows: list[Format]) -> None:
    """Draw a box for each bit."""
    for place, row in enumerate(rows):
        start = 0
        for part, count, (color, _, _, hatch) in zip(
            ("sign", "exponent: range", "fraction: precision"), (1, row.exponent, row.fraction), STYLES, strict=False
        ):
            axes.bar(
                range(start, start + count),
                0.66,
                width=1,
                bottom=place - 0.33,
                align="edge",
                color=color,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.8,
                label=part if place == 0 else None,
            )
            if count > 1:
                axes.text(
                    start + count / 2,
                    place,
                    count,
                    ha="center",
                    va="center",
                    fontsize=10,
                    fontweight="bold",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
                )
            start += count
        if row.name == "TF32":
            axes.text(start + 0.4, place, "kept in 32 bits, multiplied with 19", va="center", fontsize=9)
    axes.set(title="Bits", xlim=(0, 32), xticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.legend(ncols=3, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)


def range_panel(axes: Axes, rows: list[Format]) -> None:
    """Draw the range from the smallest number above zero to the largest, on a logarithmic axis."""
    for place, row in enumerate(rows):
        low, normal, high = (math.log2(value) for value in (row.smallest, row.normal, row.largest))
        (color, *_) = STYLES[0]
        (_, _, _, hatch) = STYLES[1]
        axes.barh(
            place, high - normal, left=normal, height=0.5, color=color, label="full precision" if place == 0 else None
        )
        axes.barh(
            place,
            normal - low,
            left=low,
            height=0.5,
            color="white",
            edgecolor=color,
            hatch=hatch,
            label="subnormal: fewer and fewer bits" if place == 0 else None,
        )
        axes.text(low - 2, place, f"{row.smallest:.1e}", ha="right", va="center", fontsize=9)
        axes.text(
            high + 2, place, f"{row.largest:.2e}" if high > 20 else f"{row.largest:,.0f}", va="center", fontsize=9
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set(title="Range", xlim=(-176, 154), xlabel="magnitude, each step a doubling")
    axes.set_xticks(range(-150, 151, 50), [power_of_two(power) for power in range(-150, 151, 50)])
    axes.legend(ncols=2, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)


def spacing_panel(axes: Axes, rows: list[Format]) -> None:
    """Draw every number of a format from 1 to a little above."""
    end = 1 + 4 * rows[2].eps
    for place, row in enumerate(rows):
        count = round((end - 1) / row.eps)
        if count > 1000:
            axes.barh(place, end - 1, left=1, height=0.6, color=FAINT)
        else:
            axes.vlines(
                [1 + step * row.eps for step in range(count + 1)], place - 0.3, place + 0.3, color=INK, linewidth=1.6
            )
        axes.text(end + 0.0004, place, f"{count:,} steps\nof {power_of_two(-row.fraction)}", va="center", fontsize=9)
    axes.set(
        title="Spacing: every number from 1 to 1.03125", xlim=(1 - 0.0003, end + 0.0046), xticks=[1, 1.01, 1.02, 1.03]
    )


def main() -> None:
    rows = formats()
    print(
        f"{'':<10}{'bits':>5}{'exponent':>9}{'fraction':>9}{'largest':>10}{'full above':>11}{'smallest':>10}"
        f"{'after 1':>9}{'digits':>7}"
    )
    for row in rows:
        print(
            f"{row.name:<10}{1 + row.exponent + row.fraction:>5}{row.exponent:>9}{row.fraction:>9}"
            f"{row.largest:>10.2e}{row.normal:>11.2e}{row.smallest:>10.1e}{row.eps:>9.1e}"
            f"{(row.fraction + 1) * math.log10(2):>7.1f}"
        )
    with picture(Path(__file__).with_suffix(".png"), 9, 7.4) as figure:
        panels = figure.subplots(3, 1)
        for axes, draw in zip(panels, (bits_panel, range_panel, spacing_panel), strict=True):
            draw(axes, rows)
            axes.set_yticks(range(len(rows)), [row.name for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.grid(False)


if __name__ == "__main__":
    main()
