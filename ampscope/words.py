"""Write a report's sections as lines for a terminal: types and casts, memory, ranges, the scaler's diary."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from typing import Any

from ampscope.text import end_of, heading, paragraph, table


def dtype_lines(
    label: str, reason: str, rows: list[dict[str, Any]], cost: dict[str, Any], *, full: bool = False
) -> list[str]:
    """Return the trace as a table grouped by operator and types, or with `full` module by module."""
    lines = paragraph(f"{label}: {reason}")
    ran = [row for row in rows if not row["view"]]
    calls, count = (sum(row["calls"] for row in some) for some in (ran, rows))
    if not full and not any("float16" in name for row in ran for name in (*row["inputs"], row["output"])):
        return [*lines, f"  All {calls} operators ran in float32, without a cast (--full lists them)."]
    groups = defaultdict(list)
    for row in rows if full else ran:
        inputs = ",".join([name for name in row["inputs"] if "float" in name] or row["inputs"][:1])
        types = [name.replace("bfloat", "bf").replace("float", "fp") for name in (inputs, row["output"])]
        place = f"{row['phase']} {row['module']} {row['kind']}".rstrip() if full else row["phase"]
        name = f"{row['op']} (cast)" if row["cast"] else row["op"]
        groups[place, name, *types].append(row)
    cells = [["operator", "in", "out", "calls", "" if full else "modules"]]
    for place, found in itertools.groupby(groups.items(), lambda group: group[0][0]):
        cells.append([place])
        for (_, op, *types), members in found:
            modules = {row["module"]: row["kind"] for row in members if row["module"]}
            kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(modules.values()).items())
            name = "".join(modules) if len(modules) == 1 else kinds
            cells.append([op, *types, str(sum(row["calls"] for row in members)), "" if full else name])
    lines += table("<<<><", cells, gap=1)
    views = "" if full else f"{count - calls} views, which compute nothing, are left out; --full lists all by module. "
    return lines + paragraph(views + cast_words(cost), "  ")


def cast_words(cost: dict[str, Any]) -> str:
    """Return the cost of the casts in a sentence or two."""
    phases = ", ".join(f"{cost['casts'].get(phase, 0)} in {phase}" for phase in ("forward", "loss", "backward"))
    text = (
        f"Casts: {sum(cost['casts'].values())} an update ({phases}), {cost['bytes'] / 2**20:,.0f} MB read and "
        f"written. By themselves they take {1000 * cost['seconds']:,.1f} ms"
    )
    update = cost["update_seconds"]
    return f"{text}, {cost['seconds'] / update:.1%} of the update's {1000 * update:,.0f} ms." if update else f"{text}."


def megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.1f}"


def memory_lines(ledger: list[dict[str, Any]]) -> list[str]:
    """Return the ledger as a table with a column for each precision, and why the peak fell or did not."""
    lines = heading(
        "2. Memory ledger",
        "The memory of one training update, in MB of 2**20 bytes, by purpose; the "
        "parts do not add up to the peak, because gradients are made while activations are freed. AMP "
        "shrinks only activations: weights, gradients and the optimizer's state stay FP32, and autocast adds 16-bit "
        "copies of the weights. A dash is not measured.",
    )
    if not ledger:
        return [*lines, "  No precision ran."]
    first = ledger[0]
    parts = [part for part in first if part != "precision"]
    cells = [[part.replace("_", " "), *(megabytes(row[part]) for row in ledger)] for part in parts]
    lines += table("<" + ">" * len(ledger), [["", *(row["precision"] for row in ledger)], *cells])
    for row in ledger[1:]:
        peak = f"the peak is {row['peak'] / first['peak']:.0%}, " if row["peak"] and first["peak"] else ""
        if first["activations"]:
            lines += paragraph(
                f"{row['precision']} against {first['precision']}: {peak}the activations are "
                f"{row['activations'] / first['activations']:.0%}; a larger batch makes these count for more.",
                "  ",
            )
    if "resident" in first:
        lines += paragraph(
            "Resident memory seldom falls within a process: `doctor` measures each precision in one of its own.", "  "
        )
    return lines


def share(part: int | None, whole: int) -> str:
    """Return a share of values as text; a dash if there were none."""
    if part is None or not whole:
        return "–"
    value = part / whole
    return f"{value:.2%}" if value >= 1e-4 else "<.01%" if value else "0"


def underflow_lines(underflow: dict[str, Any]) -> list[str]:
    """Return the underflow map as a table of the layers whose products autocast computes in float16."""
    rows = {(row["group"], row["name"]): row for row in underflow["layers"] if row["through_float16"]}
    weights: dict[str, list[str]] = defaultdict(list)  # by module, whatever its parameters are called
    for group, name in rows:
        module, _, last = name.rpartition(".")
        if group == "parameter" and not last.startswith("bias"):
            weights[module].append(name)
    names = [*weights]
    scales = {f"{scale:g}": f"2^{math.log2(scale):.4g}" for scale in underflow["scales"]}
    room = 78 - 14 * len(scales)

    def cells(title: str, kind: str, layers: list[str]) -> list[str]:
        """Return a row: the shares among these layers' weight gradients, then among the gradients of their outputs."""
        shares = []
        parameters = [("parameter", weight) for name in layers for weight in weights[name]]
        for keys in (parameters, [("activation", name) for name in layers]):
            found = [rows[key] for key in keys if key in rows and rows[key]["nonzero"]]
            total = sum(row["nonzero"] for row in found)
            shares += [share(sum(row["by_scale"][scale][kind] for row in found), total) for scale in scales]
        return [end_of(title, room), *shares]

    lines = heading(
        "3. Underflow map",
        "The share of nonzero gradient values, computed in true FP32, that become zero "
        "when they are multiplied by the loss scale and cast to float16. GradScaler saves the values that "
        "vanish at scale 2^0 and not at 2^16; bfloat16 has FP32's range and needs no scale. A dash: no gradient was "
        "nonzero, so nothing was measured. The last line counts values that would overflow: with one such value, "
        "GradScaler skips the update.",
    )
    if not underflow["layers"]:
        return [*lines, "  No gradient was computed: the loss does not depend on a trained parameter."]
    lines += table(
        "<" + 2 * len(scales) * ">",
        [
            ["gradient of", *["weight"] * len(scales), *["output"] * len(scales)],
            ["at loss scale", *2 * [*scales.values()]],
            *(cells(name or "(the model)", "zero", [name]) for name in names),
            *(cells(f"all: {kind}", kind, names) for kind in ("zero", "subnormal", "overflow")),
        ],
        gap=1,
    )
    empty = sum(not row["nonzero"] for row in rows.values())
    if empty:
        lines += paragraph(f"{empty} of {len(rows)} gradients are zero everywhere: nothing was measured there.", "  ")
    if underflow["scaler_scale"]:
        lines.append(f"  The scaler's own scale stood at {underflow['scaler_scale']:,.10g}.")
    return lines


def activation_lines(activations: list[dict[str, Any]], most: int = 12) -> list[str]:
    """Return the effect of each format on activations: of all together, and of the modules with the largest values."""
    lines = heading(
        "5. Activation ranges",
        "The outputs of modules in FP32, and the share of the nonzero values that a format would make zero, subnormal "
        "(few digits) or infinite. The loss scale does not touch activations. float8 is shown without the scale of "
        "its own that each tensor gets there.",
    )
    measured = [row for row in activations if row["nonzero"]]
    if not measured:
        return [*lines, "  No activation was nonzero: nothing was measured."]
    total = sum(row["nonzero"] for row in measured)
    cells = [["all modules", "zero", "subnormal", "overflow"]]
    for name in measured[0]["formats"]:
        counts = [sum(row["formats"][name]["1"][kind] for row in measured) for kind in cells[0][1:]]
        cells.append([name, *(share(count, total) for count in counts)])
    lines += [*table("<>>>", cells), ""]
    highest = sorted(measured, key=lambda row: -row["largest"])[:most]
    cells = [["module", "kind", "smallest", "largest", "e4m3 over"]]
    for row in highest:
        over = share(row["formats"]["float8_e4m3fn"]["1"]["overflow"], row["nonzero"])
        name = end_of(row["name"], 32) or "(the model)"
        cells.append([name, row["kind"][:14], f"{row['smallest']:.2g}", f"{row['largest']:.3g}", over])
    lines += table("<<>>>", cells)
    if len(measured) > most:
        lines.append(f"  The {most} that reach highest of {len(measured)}; inspect.json has all.")
    return lines


def diary_lines(metrics: list[dict[str, Any]]) -> list[str]:
    """Return a run's loss scale and skipped updates; epochs of the same scale without skips share a line.

    `metrics` are the lines of metrics.jsonl or of watch's diary: epoch, updates, loss_scale, skipped_updates, and
    `skips`, a list of {"update": 1-based over the run, "parameter": the first one in the backward pass with a gradient
    that was not finite, "scale"}.
    """
    if not metrics:
        return heading(
            "4. Scaler diary",
            "No run was named, so there is no diary to show. Name one with "
            "--checkpoint_name to see its loss scale and skipped updates.",
        )
    lines = heading(
        "4. Scaler diary",
        "The loss scale after each epoch and the updates that were skipped because a "
        "gradient was not finite. A few skips at the start are the scaler finding its level; skips that "
        "go on, or a scale that falls below 1, are a sick run.",
    )
    skips = [(line["epoch"], skip) for line in metrics for skip in line.get("skips") or []]
    if not skips and all(line.get("loss_scale") in (None, 1) for line in metrics):
        return [*lines, "  This run had no scaler at work: it is needed for float16 alone."]
    cells = [["epochs", "loss scale", "skipped updates"]]
    for (scale, _), members in itertools.groupby(
        metrics, lambda line: (line.get("loss_scale"), line["epoch"] if line.get("skipped_updates") else None)
    ):
        first, *rest = members
        skipped = first.get("skipped_updates")
        cells.append(
            [
                f"{first['epoch']} to {rest[-1]['epoch']}" if rest else f"{first['epoch']}",
                "–" if scale is None else f"{scale:,.10g}",
                "–" if skipped is None else str(skipped),
            ]
        )
    lines += table("<>>", cells)
    if skips:
        cells = [
            [f"{skip['update']:,} (epoch {epoch})", f"{skip['scale']:,.10g}", skip["parameter"]]
            for epoch, skip in skips[:20]
        ]
        lines += ["", *table(">><", [["update", "scale", "first bad gradient on the way back"], *cells])]
        lines.append(f"  {len(skips)} skipped{' in all; the first 20 are shown' if len(skips) > 20 else ''}")
    return lines


def payoff_words(payoff: dict[str, Any]) -> list[str]:
    """Return the ceiling, the roofline if it was measured, and the recommendation."""
    lines = []
    ceiling = payoff["amdahl"]
    if ceiling is not None:
        text = f"Products are {ceiling['product_share']:.0%} of a float32 update"
        if ceiling["ceiling"] is not None:
            text += f": if they alone cost nothing, it would be {ceiling['ceiling']:.2f} times as fast (Amdahl's law)"
        if ceiling["expected"] is not None:
            text += (
                f". This device multiplies {ceiling['product_gain']:.2f} times as fast in 16 bits, which would give "
                f"{ceiling['expected']:.2f}"
            )
        measured = max(payoff["recommendation"]["speedup"].values(), default=0.0)
        estimates = [value for value in (ceiling["ceiling"], ceiling["expected"]) if value is not None]
        if any(measured > value for value in estimates):
            text += f". {measured:.2f} was measured: other operators became faster too"
        lines += paragraph(f"{text}.", "  ")
    roofline = payoff.get("roofline")
    if roofline is not None:
        lines += paragraph(roofline["words"], "  ")
    for sentence in payoff["recommendation"]["words"]:
        lines += paragraph(sentence, "  ")
    return lines
