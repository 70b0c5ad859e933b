"""Write the results of `inspect_step` as text of 80 columns, JSON, pictures and one HTML page."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ampscope.errors import InspectError
from ampscope.files import json_text, replacing
from ampscope.findings import Finding
from ampscope.text import cut, end_of, heading, paragraph, table
from ampscope.words import (
    activation_lines,
    diary_lines,
    dtype_lines,
    megabytes,
    memory_lines,
    payoff_words,
    underflow_lines,
)


@dataclass
class Report:
    """The results of an inspection: `content` is that of inspect.json, `findings` are the broken rules."""

    content: dict[str, Any]
    everything: list[Finding] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """Return the broken rules in the user's own code or in the measurements."""
        return [finding for finding in self.everything if finding.level == "finding"]

    @property
    def notes(self) -> list[Finding]:
        """Return the broken rules in a library's code: they are reported, but are not the user's fault."""
        return [finding for finding in self.everything if finding.level == "note"]

    @property
    def ok(self) -> bool:
        """Return True if no rule is broken."""
        return not self.findings

    def __str__(self) -> str:
        return self.text()

    def text(self, *, full: bool = False) -> str:
        """Return all sections as text; with `full` every operator of every module."""
        content = self.content
        lines = heading(
            "1. What ran in which dtype",
            "Each line is one operator as it ran below autocast: the types of "
            "the tensors that went in, the type that came out, how often, and for which modules. Where weights "
            "are fp32 and a product ran in 16 bits, autocast has put a cast in between; the casts are lines of "
            "their own.",
        )
        for name, entry in content["precisions"].items():
            lines.append("")
            if name in content["dtypes"]:
                rows = content["dtypes"][name]
                lines += dtype_lines(entry["label"], entry["reason"], rows, content["casts"][name], full=full)
            else:
                lines += paragraph(f"{entry['label']}: does not run here. {entry['error']}")
        lines += ["", *memory_lines(content["memory"])]
        if content["underflow"] is not None:
            lines += ["", *underflow_lines(content["underflow"])]
        lines += ["", *self._diary_lines()]
        if content["underflow"] is not None:
            lines += ["", *activation_lines(content["underflow"]["activations"])]
        lines += ["", *self._wide_lines(), "", *self._sync_lines(), "", *self._payoff_lines(), "", *self._findings()]
        return "\n".join(lines)

    def _diary_lines(self) -> list[str]:
        return diary_lines(self.content["scaler"])

    def _wide_lines(self) -> list[str]:
        lines = heading(
            "6. Products left in float32 under AMP",
            "Work is the share of the forward products' floating point operations; for an operator whose operations "
            "nobody counts, it is the share of the traced time.",
        )
        some = False
        for name, rows in self.content["float32_products"].items():
            cells = [["operator", "module", "share", "why"]]
            for row in rows[:12]:
                cells.append([row["op"], row["module"] or "–", f"{row['share']:.1%}", row["reason"]])
            if rows:
                some = True
                lines += ["", f"{name}:", *table("<<><", cells)]
        if not some:
            ran = bool(self.content["float32_products"])
            lines.append("  None: every product ran in 16 bits." if ran else "  Nothing ran under AMP.")
        return lines

    def _sync_lines(self) -> list[str]:
        rows = self.content["synchronisations"]
        lines = heading(
            "7. What the host waits for",
            "Reads of a tensor's value or of a size that depends on values: on a GPU each waits until all work before "
            "it is done. PyTorch's own are left out.",
        )
        if not rows:
            return [*lines, "  None."]
        cells = [["what", "times", "line"]]
        for row in rows[:15]:
            cells.append([row["what"], str(row["count"]), end_of(row["where"], 56)])
        return [*lines, *table("<><", cells)]

    def _payoff_lines(self) -> list[str]:
        payoff = self.content["payoff"]
        lines = heading(
            "8. Will it pay?",
            "One update in each precision, in turns in one process; the shortest of some, because whatever else runs "
            "on the machine can only make one longer.",
        )
        if payoff is None:
            return [*lines, "  Not measured."]
        cells = [["precision", "ms", "speed-up", "peak MB", "activations MB"]]
        memory = {row["precision"]: row for row in self.content["memory"]}
        base = next(iter(payoff["speed"].values()))["shortest"]
        for name, entry in payoff["speed"].items():
            row = memory.get(name, {})
            sizes = (megabytes(row.get(key)) for key in ("peak", "activations"))
            cells.append([name, f"{1000 * entry['shortest']:,.1f}", f"{base / entry['shortest']:.2f}", *sizes])
        lines += table("<>>>>", cells)
        return [*lines, *payoff_words(payoff)]

    def _findings(self) -> list[str]:
        lines = heading("Findings")
        if not self.everything:
            return [*lines, "None: no rule is broken."]
        for number, finding in enumerate(self.everything, 1):
            lines += ["", *paragraph(f"{finding.rule} ({finding.level}): {finding.record()['title']}.", f"{number}. ")]
            if finding.place:
                lines += [f"   {finding.place}", cut(f"   {finding.place.code}")]
            lines += paragraph(finding.message, "   ")
            for cure in finding.cures:
                lines += paragraph(f"{cure}.", "   - ")
        if not self.findings:
            lines += ["", *paragraph("Notes are about a library's code; no rule is broken in yours.")]
        return lines

    def record(self) -> dict[str, Any]:
        """Return the content of inspect.json."""
        return self.content | {"findings": [finding.record() for finding in self.everything], "ok": self.ok}

    def write(self, folder: str | Path) -> list[Path]:
        """Write inspect.json, the pictures and inspect.html. Raise InspectError if the folder cannot be written."""
        from ampscope.page import write_report_page
        from ampscope.pictures import activation_picture, diary_picture, magnitude_picture, memory_picture

        folder = Path(folder)
        content = self.content
        jobs: list[tuple[Callable[..., None], Any, str]] = [(memory_picture, content["memory"], "memory.png")]
        underflow = content["underflow"]
        if underflow is not None:
            if any(underflow["histogram"].values()):
                jobs.append((magnitude_picture, underflow["histogram"], "underflow.png"))
            if any(row["largest"] for row in underflow["activations"]):
                jobs.append((activation_picture, underflow["activations"], "activations.png"))
        if any((line.get("loss_scale") or 1) != 1 for line in content["scaler"]):
            jobs.append((diary_picture, content["scaler"], "scaler.png"))
        jobs = [job for job in jobs if job[1]]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            drawn = {}
            for draw, what, name in jobs:
                draw(what, folder / name)
                draw(what, buffer := io.BytesIO())
                drawn[name] = buffer.getvalue()
            with replacing(folder / "inspect.json") as file:
                file.write(f"{json_text(self.record(), indent=1)}\n".encode("utf-8", "surrogateescape"))
            write_report_page(self, folder, drawn)
        except OSError as error:
            raise InspectError(
                f"cannot write into {folder} ({error.strerror}). Name another folder with --out."
            ) from None
        return [folder / name for _, _, name in jobs] + [folder / "inspect.json", folder / "inspect.html"]
