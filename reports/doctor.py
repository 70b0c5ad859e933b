"""What the doctor found, as text for the terminal. Plain values in, words out; imports no torch."""

from __future__ import annotations

from typing import Any

from precision_table import label_of
from reports.text import paragraph, table


def _energy_line(measured: dict[str, Any]) -> list[str]:
    """What an image costs in joules; nothing where nothing counts them."""
    counted = {name: row.get("joules_per_image") for name, row in measured.items()}
    if None in counted.values():
        return []
    text = ", ".join(f"{joules:.3g} J in {label_of(name)}" for name, joules in counted.items())
    return paragraph(f"Energy of one image, by the machine's own counter: {text}.", "  ")


def doctor_text(findings: dict[str, Any]) -> str:
    """The findings as text of at most 80 columns: verdict, reasons, evidence, the command to copy."""
    setting = findings["setting"]
    measured = findings["measured"]
    loader = findings.get("loader_images_per_second")
    turns = measured["fp32"]["rounds"]
    phases = list(measured["fp32"]["phase_shares"])
    lines = [*paragraph(findings["verdict"]), "", "Why"]
    for reason in findings["reasons"]:
        lines += paragraph(reason, "- ")
    lines += ["", "The machine"]
    for name, value in findings["machine"].items():
        lines += paragraph(f"{value}", f"  {name.replace('_', ' '):<20}") if value else []
    lines += [
        "",
        *paragraph(
            f"The training update ({setting['model_name']}, {setting['batch_size']} images of {setting['image_size']} "
            f"pixels): median of {len(turns)} rounds of {turns[0]['updates']}, and the shares of its time by phase"
        ),
    ]
    lines += table(
        "<>>>>>>>",
        [["", "images/s", "speed-up", "memory", *phases]]
        + [
            [
                label_of(name),
                f"{row['images_per_second']:,.1f}",
                f"{row['speedup']:.2f}",
                f"{row['training_mb']:,.0f}",
                *(f"{row['phase_shares'][phase]:.1%}" for phase in phases),
            ]
            for name, row in measured.items()
        ],
    )
    lines += paragraph(
        f"Memory in MB: {measured['fp32']['memory']['memory_kind']}, less what was held before there was a model."
        + (f" The loader by itself feeds {loader:,.0f} images/s." if loader else ""),
        "  ",
    )
    lines += _energy_line(measured)
    lines += ["", "The same by kind of operator, and how far the speed-up can go"]
    lines += table(
        "<>>>>>>>",
        [["", *measured["fp32"]["shares"], "s", "ceiling"]]
        + [
            [
                label_of(name),
                *(f"{share:.0%}" for share in row["shares"].values()),
                *(f"{findings['ceiling'][name][key]:.2f}" if name != "fp32" else "" for key in ("s", "ceiling")),
            ]
            for name, row in measured.items()
        ],
    )
    rates = ", ".join(f"{row['tflops']:.3g} in {label_of(name)}" for name, row in measured.items())
    lines += paragraph(
        "Ceiling: 1 / (1 - f + f/s), Amdahl's law, with f the products' share of an FP32 update and s how much faster "
        f"a large matrix product runs ({rates} TFLOP/s).",
        "  ",
    )
    command = findings["command"].replace(" --data_dir", " \\\n      --data_dir")  # to fit the terminal
    return "\n".join(
        [
            *lines,
            "",
            "To copy (with --demo, if you have no data yet)",
            f"  {command}",
            "",
            f"This took {findings['seconds']:.0f} s.",
        ]
    )
