"""Write the ladder as a terminal table, as Markdown and as a picture. Reads files; imports no torch."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from ampscope.look import BLUE, FAINT, VERMILION, picture
from ampscope.text import WIDTH
from reports.text import align, markdown, markdown_table

HEADER = ["rung", "images/s", "÷ before", "÷ first", "memory, MB", "bound", "of bound"]


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the table's cells, a header first."""
    cells = [HEADER]
    for rung in found["rungs"]:
        if rung["skipped"]:
            continue
        bound = rung["bound_images_per_second"]
        share = rung["share_of_bound"]
        line = [
            rung["name"] + ("" if rung["kept"] else " *"),
            _number(rung["images_per_second"]),
            f"{rung['speedup_before']:.2f}" if rung["speedup_before"] else "",
            f"{rung['speedup_first']:.2f}",
            f"{rung['training_mb']:,.0f}",
            _number(bound) if bound else "",
            f"{share:.2f}" if share else "",
        ]
        cells.append(line)
    return cells


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def remarks(found: dict[str, Any]) -> list[str]:
    """Return the text below the table: conditions, skipped rungs, the roofline of the last step, why the gain ends."""
    setting = found["setting"]
    lines = [
        f"{found['machine']['name']}; torch {found['machine']['torch']}; {setting['model_name']}, "
        f"{setting['batch_size']} images of {setting['image_size']} pixels in an update; median of "
        f"{setting['rounds']} rounds. Memory: {found['memory_kind']}, less what was held before there was a model.",
        *([setting["remark"]] if setting["remark"] else []),
    ]
    if any(not rung["kept"] and not rung["skipped"] for rung in found["rungs"]):
        lines.append("* slower than the rung before it: left out of what follows.")
    lines += [f"{rung['name']}: {rung['skipped']}." for rung in found["rungs"] if rung["skipped"]]
    rates = ", ".join(f"{rate / 1e12:.3g} in {name}" for name, rate in found["rates"].items())
    lines.append(
        f"Bound: each operator at the rate of a large matrix product ({rates} TFLOP/s) or of a copy "
        f"({found['bandwidth'] / 1e9:.3g} GB/s), whichever takes longer, in eager mode; measured on this machine."
    )
    return [*lines, *found.get("remarks", []), found["why"]]


def roofline_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the roofline of the last eager rung by group of operators, a header first."""
    cells = [["group of operators", "GFLOP", "MB", "limit", "bound, ms", "measured, ms", "of bound"]]
    for name, group in found["roofline"]["groups"].items():
        measured = group["measured_seconds"]
        cells.append(
            [
                name,
                f"{group['flops'] / 1e9:,.1f}",
                f"{group['bytes'] / 2**20:,.0f}",
                group["limit"],
                f"{group['bound_seconds'] * 1e3:,.2f}",
                f"{measured * 1e3:,.2f}" if measured else "",
                f"{group['bound_seconds'] / measured:.2f}" if measured else "",
            ]
        )
    return cells


def ladder_text(found: dict[str, Any]) -> str:
    """Return the table, the roofline and the remarks for the terminal."""
    lines = align(rows(found))
    lines += ["", f"The roofline of one update: {found['roofline_of']}", *align(roofline_rows(found)), ""]
    for remark in remarks(found):
        lines += textwrap.wrap(remark, WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def ladder_markdown(found: dict[str, Any]) -> str:
    """Return the table, the roofline and the remarks as Markdown."""
    parts = [markdown_table(rows(found)), f"The roofline of one update: {found['roofline_of']}"]
    return "\n\n".join([*parts, markdown_table(roofline_rows(found)), *map(markdown, remarks(found))]) + "\n"


def ladder_picture(found: dict[str, Any], path: Path) -> None:
    """Draw a bar for the images/s of each rung, with a mark at its bound."""
    rungs = [rung for rung in found["rungs"] if not rung["skipped"]]
    with picture(path, 8, 1.2 + 0.45 * len(rungs)) as figure:
        axes = figure.subplots()
        places = range(len(rungs))
        colours = [BLUE if rung["kept"] else FAINT for rung in rungs]
        axes.barh(places, [rung["images_per_second"] for rung in rungs], 0.6, color=colours)
        bounds = [(place, rung["bound_images_per_second"]) for place, rung in enumerate(rungs)]
        bounds = [(place, bound) for place, bound in bounds if bound]
        axes.plot([bound for _, bound in bounds], [place for place, _ in bounds], "|", color=VERMILION, ms=16, mew=2.5)
        axes.set_yticks(places, [rung["name"] + ("" if rung["kept"] else " (left out)") for rung in rungs])
        axes.invert_yaxis()
        axes.set_xlabel("images/s (mark: bound in eager mode)")
        axes.set_title("The ladder: what each step brings")
        axes.grid(axis="y", visible=False)
