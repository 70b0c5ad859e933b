"""Interpret the measurements of doctor and its ladder: verdict, reasons, why the gain ends, a command to copy.

Takes plain values, as `commands.doctor.examine` and `measuring.ladder` collect them. Knows nothing of how they were
measured or are shown.
"""

from __future__ import annotations

from typing import Any

import torch

from ampscope.timing import amdahl
from precision_table import label_of
from system.cards import EMULATED, NONE
from utils import typed


def ceilings(measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return, for each precision except FP32, the ceiling of its speed-up and the values behind it.

    They are f (of the whole update, data included), s, the ceiling that follows from both, and the speed-up of the
    update's own matrix products and convolutions.
    """
    reference = measured["fp32"]
    found = {}
    share = reference["shares"]["products"] * (1 - reference["phase_shares"]["data"])
    for name, row in measured.items():
        if name != "fp32":
            speedup = row["tflops"] / reference["tflops"]
            gained = row["speedup"] * reference["shares"]["products"] / max(row["shares"]["products"], 0.01)
            found[name] = {"f": share, "s": speedup, "ceiling": amdahl(share, speedup), "gained": gained}
    return found


def advise(findings: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict, the reasons for it, and the command to copy, from the numbers alone.

    AMP is recommended if it is 5 % faster, or about as fast and 15 % smaller.
    """
    measured = findings["measured"]
    speedups = {name: row["speedup"] for name, row in measured.items()}
    best = max((name for name in measured if name.startswith("amp")), key=lambda name: speedups[name], default=None)
    recommended = "fp32"
    reasons = [_hardware_reason(findings["machine"])]
    verdict = "AMP cannot be used on this device; train in FP32."
    if best:
        speedup = round(speedups[best], 2)  # rounded as it is printed
        saving = round(measured[best]["training_mb"] / measured["fp32"]["training_mb"], 2)
        if speedup >= 1.05 or (speedup >= 0.95 and saving <= 0.85):
            recommended = best
        effect = "pays" if speedup >= 1.05 else "brings hardly any speed" if speedup >= 0.95 else "is slower"
        verdict = (
            f"AMP {effect} here: {label_of(best)} trains {speedup:.2f} times as fast as FP32, in {saving:.0%} "
            "of its memory."
        )
        reasons += _amp_reasons(findings, best, saving)
    if speedups.get("tf32", 0.0) >= 1.05 * speedups[recommended]:
        recommended = "tf32"
        verdict = f"{verdict} TF32 is the fastest."
    spread = measured["fp32"]["spread"]
    if spread > 0.3:
        reasons.insert(
            0,
            f"The rounds differ by {spread:.0%}: something else uses this machine. Take the figures as "
            "rough, or ask again when it is quiet.",
        )
    reasons += [f"{name} could not be measured: {reason}" for name, reason in findings["failed"].items()]
    return {
        "recommended": recommended,
        "verdict": verdict,
        "reasons": reasons,
        "command": _command(findings, recommended),
    }


def _hardware_reason(has: dict[str, Any]) -> str:
    if "compute_capability" in has:
        return f"{has['name']} (compute capability {has['compute_capability']}, float16 {has['float16']}) has " + (
            "Tensor Cores, which multiply 16-bit numbers several times as fast as FP32."
            if has["matrix_unit"] != NONE
            else "no Tensor Cores: 16-bit products are not faster, but activations take half the memory."
        )
    if has["bfloat16"] == EMULATED:
        return "bfloat16 is imitated with FP32 on this processor, so only memory traffic shrinks."
    where = ", in the AMX matrix unit" if has.get("matrix_unit") == "AMX" else ""
    return f"bfloat16 is computed natively{where}."


def _amp_reasons(findings: dict[str, Any], best: str, saving: float) -> list[str]:
    row = findings["measured"][best]
    top = findings["ceiling"][best]
    reasons = [
        f"Matrix products and convolutions take {top['f']:.0%} of an FP32 update. A large product runs {top['s']:.1f} "
        f"times as fast in 16 bits, which by itself would give {top['ceiling']:.2f}; those of this model ran "
        f"{top['gained']:.1f} times as fast, and are {row['shares']['products']:.0%} of the AMP update."
    ]
    if row["speedup"] > top["ceiling"]:
        reasons.append(
            f"The measured {row['speedup']:.2f} exceeds this because other operators are faster too (their tensors are "
            "half as large), or because the model's products gained more than the large one."
        )
    if row["busy"] is not None and row["busy"] < 0.8:
        reasons.append(
            f"The GPU computes in {row['busy']:.0%} of an AMP update and waits for the next kernel "
            "otherwise. A larger --batch_size or --compile would let AMP show more."
        )
    if saving > 0.8:
        change = "falls little" if saving < 1 else "does not fall"
        reasons.append(
            f"Memory {change}: weights, gradients and Adam's two moments stay FP32, and autocast adds 16-bit copies of "
            "the weights. Only activations shrink, so a larger batch or image saves more."
        )
    loader = findings.get("loader_images_per_second")
    rate = row["images_per_second"]
    if loader is not None:
        what = "data is not the limit."
        if loader < 1.1 * rate:
            way = "Their decoding is the limit: more --num_workers (up to the number of cores) or smaller files."
            kept = "They are kept decoded already: a smaller --image_size leaves less to copy."
            what = "training waits for data, and no precision helps with that. "
            what += way if findings.get("loader_streams") else kept
        reasons.append(f"The loader feeds {loader:,.0f} images/s and AMP computes {rate:,.0f}: {what}")
    return reasons


def why_it_ends(
    first: dict[str, Any], last: dict[str, Any], *, speedup: float, first_share: float, share: float
) -> str:
    """Return a sentence on why the gain from the update of `first` to that of `last` ends at `speedup`.

    Both come from `ampscope.roofline.roofline`; the shares are how much of its bound each update reaches.
    """
    groups = last["groups"]
    memory = [name for name, row in groups.items() if row["limit"] == "memory"]
    traffic = sum(groups[name]["share_of_bound"] for name in memory)
    if traffic >= 0.4:
        largest = " and ".join(sorted(memory, key=lambda name: -groups[name]["bound_seconds"])[:2])
        reason = (
            f"{traffic:.0%} of the last bound is memory traffic, most of it in {largest}, which faster products do "
            "not shorten"
        )
    else:
        largest = next(iter(groups))
        products = max(last["rates"].values()) / first["rates"]["float32"]
        reason = (
            f"{groups[largest]['share_of_bound']:.0%} of the last bound is arithmetic in {largest}, and a matrix "
            f"product runs {products:.1f} times as fast as in FP32"
        )
    reached = (
        f"the bound itself became {first['bound_seconds'] / last['bound_seconds']:.2f} times as fast, and the share of "
        f"it that is reached went from {first_share:.0%} to {share:.0%}"
    )
    known = {name: row for name, row in groups.items() if row["measured_seconds"]}
    if share < 0.8 and known:
        lost = max(known, key=lambda name: known[name]["measured_seconds"] - known[name]["bound_seconds"])
        factor = known[lost]["measured_seconds"] / known[lost]["bound_seconds"]
        reached += f" ({lost} took {factor:.1f} times their bound)"
    return f"The gain ends at {speedup:.2f} times because {reason}; {reached}."


def _command(findings: dict[str, Any], name: str) -> str:
    """Return the training command for precision `name`, with the image and batch size that was timed."""
    setting = findings["setting"]
    device = torch.device(findings["machine"]["device"])
    words = ["python main.py"]
    if name == "tf32":
        words.append("--tf32")
    if name.startswith("amp"):
        words.append("--amp")
    if name == "amp-bf16" and device.type == "cuda":
        words.append("--amp_dtype bfloat16")
    if device.type == "cpu" and torch.cuda.is_available():
        words.append("--device cpu")
    if setting["model_name"].lower() != "resnet18":
        words.append(f"--model {setting['model_name']}")
    words += [f"--{option} {setting[option]}" for option in ("image_size", "batch_size")]
    if "data_dir" in findings:
        words.append(typed("--data_dir", findings["data_dir"]))
    return " ".join(words)
