"""Write the results of `doctor` as text for the terminal. Takes plain values; imports no torch."""

from __future__ import annotations

from typing import Any

from ampscope.text import paragraph, table
from precision_table import label_of


def doctor_text(findings: dict[str, Any]) -> str:
    """Return the results as text of at most 80 columns: verdict, reasons, measurements, the command to copy."""
    command = findings["command"].replace(" --data_dir", " \\\n      --data_dir")  # break the line to fit the terminal
    lines = [
        *paragraph(findings["verdict"]),
        "",
        "Why",
        *(line for reason in findings["reasons"] for line in paragraph(reason, "- ")),
        "",
        "The machine",
        *_machine_lines(findings["machine"]),
        "",
        *_update_lines(findings),
        "",
        "The same by kind of operator, and what faster products would give by themselves",
        *_ceiling_lines(findings),
        "",
        "Does it compute right? Operators and their gradients against float64 on the CPU",
        *(line for name, found in findings["arithmetic"].items() for line in _arithmetic_lines(name, found)),
        "",
        "To copy (with --demo, if you have no data yet)",
        f"  {command}",
        "",
        f"This took {findings['seconds']:.0f} s.",
    ]
    return "\n".join(lines)


def _machine_lines(machine: dict[str, Any]) -> list[str]:
    """Return one paragraph for each property of the device; leave out empty ones."""
    lines = []
    for name, value in machine.items():
        lines += paragraph(f"{value}", f"  {name.replace('_', ' '):<20}") if value else []
    return lines


def _arithmetic_lines(dtype: str, found: dict[str, Any]) -> list[str]:
    """Describe the findings on one 16-bit type: a count, then the names of wrong, slow and missing operators."""
    checked = found["right"] + len(found["wrong"])
    said = [f"{found['right']} of {checked} are right"]
    if found["wrong"]:
        said.append("WRONG: " + ", ".join(f"{name} (off by {error:.0%})" for name, error in found["wrong"].items()))
    if found["slow"]:
        slowest = sorted(found["slow"].items(), key=lambda entry: -entry[1][0] / entry[1][1])
        times = [f"{name} {1e3 * low:.3g} ms against {1e3 * plain:.3g}" for name, (low, plain) in slowest[:3]]
        more = f" and {len(slowest) - 3} more" if len(slowest) > 3 else ""
        said.append(f"SLOWER than a quarter of float32, as reference kernels are: {', '.join(times)}{more}")
    if found["missing"]:
        said.append(f"not implemented: {', '.join(found['missing'])}")
    said += [f"{name} fails: {reason[:100]}" for name, reason in found["failed"].items()]
    return paragraph(f"{'; '.join(said)}.", f"  {dtype:<20}")


def _update_lines(findings: dict[str, Any]) -> list[str]:
    """Return the speed, memory and phases of an update in each precision."""
    setting = findings["setting"]
    measured = findings["measured"]
    loader = findings.get("loader_images_per_second")
    turns = measured["fp32"]["rounds"]
    phases = list(measured["fp32"]["phase_shares"])
    cells = [["", "images/s", "speed-up", "memory", *phases]]
    for name, row in measured.items():
        shares = [f"{row['phase_shares'][phase]:.1%}" for phase in phases]
        speed = [f"{row['images_per_second']:,.1f}", f"{row['speedup']:.2f}"]
        cells.append([label_of(name), *speed, f"{row['training_mb']:,.0f}", *shares])
    title = (
        f"The training update ({setting['model_name']}, {setting['batch_size']} images of {setting['image_size']} "
        f"pixels): median of {len(turns)} rounds of {turns[0]['updates']}, and the shares of its time by phase"
    )
    remark = f"Memory in MB: {measured['fp32']['memory']['memory_kind']}, less what was held before there was a model."
    if loader:
        remark += f" The loader by itself feeds {loader:,.0f} images/s."
    return [*paragraph(title), *table("<>>>>>>>", cells), *paragraph(remark, "  ")]


def _ceiling_lines(findings: dict[str, Any]) -> list[str]:
    """Return the shares of an update by kind of operator, and the speed-up that follows from them."""
    measured = findings["measured"]
    cells = [["", *measured["fp32"]["shares"], "s", "expected"]]
    for name, row in measured.items():
        top = ["", ""] if name == "fp32" else [f"{findings['ceiling'][name][key]:.2f}" for key in ("s", "ceiling")]
        cells.append([label_of(name), *(f"{share:.0%}" for share in row["shares"].values()), *top])
    rates = ", ".join(f"{row['tflops']:.3g} in {label_of(name)}" for name, row in measured.items())
    remark = (
        "Expected: 1 / (1 - f + f/s), Amdahl's law, with f the products' share of an FP32 update and s how much faster "
        f"a large matrix product runs ({rates} TFLOP/s). An estimate: other operators may gain as well."
    )
    return [*table("<>>>>>>>", cells), *paragraph(remark, "  ")]
