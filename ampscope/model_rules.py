"""Rules about what the model did under AMP: products left in float32, sizes, casts back and forth, range, failures."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

import torch

from ampscope.findings import Finding
from ampscope.finite import Origin, cures
from ampscope.places import Place, line_with, users_sources
from ampscope.products import ALIGNED, Product
from ampscope.recipe_rules import level_of
from ampscope.trace import Trace

CAST_BYTES = 6  # read and written for each value that is cast between 16 and 32 bits
SMALL = 0.01  # of the bytes that a step casts
SHARE = 0.05  # of the products' work; less is not worth a finding
CUSTOM_SHARE = 0.01  # of the time, for operators whose work nobody counts
UNALIGNED_SHARE = 0.1
VOCABULARY = 4096  # an outermost size up to here is the data's, above it a choice
WHY = {
    "autocast-off": "autocast is off there: the line is outside of its block, or under "
    "torch.autocast(enabled=False) or custom_fwd(cast_inputs=torch.float32)",
    "in-place-product": "autocast casts neither in-place operators nor those with out=",
    "custom-operator": "it is a custom operator without an autocast rule, so it takes what it is given",
    "custom-function": "it runs in a custom autograd function's backward, where autocast is off",
    "attention-in-float32": "PyTorch's attention has no fused kernel for this call, and its formula computes 16 bits "
    "in float32",
    "not-on-lists": "it is not on autocast's lists, so it keeps the type of its input",
    "float64": "its inputs are float64, which autocast leaves alone",
    "forward": "its forward ran in float32",
}
HELP = {
    "autocast-off": ["let autocast cover it, if its range allows"],
    "in-place-product": ["the form that returns a new tensor, such as torch.addmm instead of addmm_ or out="],
    "custom-operator": ["torch.library.register_autocast(operator, device, dtype)"],
    "custom-function": ["@torch.amp.custom_fwd(device_type=...) on forward and @torch.amp.custom_bwd(...) on backward"],
    "attention-in-float32": ["the call without that, or another device, whose kernels take other calls"],
    "not-on-lists": ["cast its inputs by hand, if its kernel knows 16 bits"],
    "float64": ["float32 inputs: numpy makes float64 unless told otherwise"],
}


def why_float32(product: Product) -> str:
    """Why a product ran in float32 or float64 although autocast was on for the step: one of WHY."""
    if product.dtype == "float64":
        return "float64"
    if product.in_custom_function:
        return "custom-function"
    if product.phase == "backward" and product.autocast is None:
        return "forward"
    if "::" in product.op or "." in product.op:
        return "custom-operator"
    if product.autocast is False:
        return "autocast-off"
    if product.op.endswith("_") or product.out_form:
        return "in-place-product"
    return "attention-in-float32" if "attention" in product.function else "not-on-lists"


def wide_products(trace: Trace) -> list[dict[str, Any]]:
    """The products that did not run in 16 bits, by place and reason, with their share of all products' work.

    Work is floating point operations of forward; for operators without a formula, the share of the traced time.
    """
    counted = [product for product in trace.products if product.phase != "backward" or product.in_custom_function]
    flops = sum(product.flops or 0 for product in counted)
    seconds = sum(trace.seconds.values())
    groups: dict[tuple, list[Product]] = defaultdict(list)
    for product in counted:
        if product.dtype in ("float32", "float64"):
            groups[why_float32(product), product.place, product.module, product.op].append(product)
    rows = []
    for (reason, place, module, op), members in groups.items():
        known = all(product.flops is not None for product in members)
        if known and flops:
            share = sum(product.flops or 0.0 for product in members) / flops
        else:
            share = sum(product.seconds for product in members) / max(seconds, 1e-12)
        rows.append(
            {
                "op": op,
                "module": module,
                "place": place,
                "reason": reason,
                "share": share,
                "by": "work" if known and flops else "time",
                "calls": len(members),
                "seconds": sum(product.seconds for product in members),
                "written_cast": next((p.written_cast for p in members if p.written_cast), None),
            }
        )
    return sorted(rows, key=lambda row: -row["share"])


def model_findings(trace: Trace, precision: str, device: str) -> list[Finding]:
    """What one traced step in an AMP precision shows."""
    found = []
    for row in wide_products(trace):
        least = CUSTOM_SHARE if row["reason"] == "custom-operator" else SHARE
        if row["share"] < least or row["reason"] == "forward":
            continue
        where = f" in {row['module']}" if row["module"] else ""
        share = f"{row['share']:.0%} of the {'products' if row['by'] == 'work' else 'operators'}' {row['by']}"
        cast = row["written_cast"]
        message = f"{row['op']}{where} ran in {'float64' if row['reason'] == 'float64' else 'float32'}: {share}."
        message += f" Why: {WHY[row['reason']]}."
        place = row["place"]
        rule = row["reason"]
        if device == "cpu" and trace.unfused.get(place):
            message += f" The call has {' and '.join(trace.unfused[place])}, which no kernel of the CPU takes."
        if cast is not None and rule == "autocast-off":
            message += f" Its input was made float32 at {cast}."
        # A product inside PyTorch cannot be mended there; a custom operator, called by torch.library, is the user's.
        inside = place is not None and place.via and rule != "custom-operator"
        level = "note" if rule == "attention-in-float32" or inside else level_of(place)
        found.append(Finding(rule, message, HELP[rule], place, row["module"], row["op"], precision, level))
    return [*found, *_round_trips(trace, precision), *_of_narrow_types(trace, precision), *_sizes(trace, precision)]


def _round_trips(trace: Trace, precision: str) -> list[Finding]:
    """Casts to float32 that autocast undoes; a note if they are a small part of all bytes that are cast."""
    total = sum(CAST_BYTES * calls * math.prod(key[5][0]) for key, calls in trace.rows.items() if key[5])
    found = []
    for (place, function), count in trace.round_trips.items():
        if place in trace.needed:
            continue
        message = f"float32 is asked for here, and {function} casts straight back to 16 bits ({count} in a step)."
        cure = ["leave the cast out: autocast casts what needs float32 by itself"]
        small = 2 * trace.round_trip_bytes[place, function] < SMALL * total
        level = "note" if small else level_of(place)
        found.append(Finding("explicit-float", message, cure, place, None, function, precision, level))
    return found


def _of_narrow_types(trace: Trace, precision: str) -> list[Finding]:
    """What a GPU would refuse or lose, and a CPU lets pass."""
    found = []
    for place, function in trace.unsafe.items():
        message = f"CUDA's autocast refuses {function} with an error; on a CPU it runs in 16 bits without a word."
        cure = ["binary_cross_entropy_with_logits on what the sigmoid takes", "autocast off for this line, in float32"]
        found.append(Finding("unsafe-function", message, cure, place, None, function, precision, level_of(place)))
    origin = trace.lineage.vanished
    if origin is not None and trace.lineage.first is None:
        ranges = "; ".join(describe_range(entry) for entry in origin.inputs[:2])
        message = f"{origin.op} overflows in float16 ({ranges}), and {origin.reached} makes the infinity finite again."
        cure = ["float32 for this line: autocast off, inputs as .float()", "bfloat16, which has float32's range"]
        level = level_of(origin.place)
        found.append(
            Finding("overflow-hidden", message, cure, origin.place, origin.module, origin.op, precision, level)
        )
    return found


def _sizes(trace: Trace, precision: str) -> list[Finding]:
    """Products with weights whose inner or output size is not a multiple of 8.

    The input of a model's first product and the output of its last are the data's own sizes (channels, classes), and
    cuDNN fills up up to four channels by itself.
    """
    products = [p for p in trace.products if p.phase != "backward" and p.dims and p.op not in ("bmm", "baddbmm")]
    total = sum(product.flops or 0 for product in products)
    ends: dict[str, list[int]] = defaultdict(list)
    for index, product in enumerate(products):
        ends[product.module.partition(".")[0] if trace.execution.subject.models.keys() != {""} else ""].append(index)
    first = {indices[0] for indices in ends.values()}
    last = {indices[-1] for indices in ends.values()}
    groups: dict[tuple, list[Product]] = defaultdict(list)
    for index, product in enumerate(products):
        inner, outer = product.dims
        data = {inner} if index in first and inner < VOCABULARY else set()
        data |= {outer} if index in last and outer < VOCABULARY else set()
        bad = [size for size in product.dims if size % ALIGNED and size > 4 and size not in data]
        if bad and product.groups == 1 and product.narrow:
            groups[product.module, product.place, tuple(bad)].append(product)
    work = sum(product.flops or 0 for members in groups.values() for product in members)
    if not total or work / total < UNALIGNED_SHARE:
        return []
    (module, place, bad), members = max(groups.items(), key=lambda item: sum(p.flops or 0 for p in item[1]))
    if place is None:  # nothing of the user's is called, as in nn.Sequential: where the number is written
        place = line_with(rf"\b{bad[0]}\b", users_sources())
    better = ", ".join(f"{size} to {-(-size // ALIGNED) * ALIGNED}" for size in dict.fromkeys(bad))
    sizes = " and ".join(str(size) for size in dict.fromkeys(bad))
    message = (
        f"{module or members[0].op} has size {sizes}; such products are {work / total:.0%} of the products' work, in "
        f"{len({key[0] for key in groups})} modules. NVIDIA's Tensor Cores read 16-bit numbers eight at a time."
    )
    return [
        Finding("unaligned-sizes", message, [f"pad {better}"], place, module, members[0].op, precision, level_of(place))
    ]


def failure(trace: Trace, precision: str) -> Finding:
    """The finding for a step that raised an error in one precision."""
    text = " ".join(str(trace.error).split())[:300]
    help_ = ["mend what the error says"]
    rule = "fails"
    place = trace.error_place
    op, forward = trace.refused
    if op and (place is None or place.function != "backward"):
        text += f" ({op} in the backward pass)"
        place = forward or place
    lacking = re.search(r"not implemented for '(Half|BFloat16)'", text)
    if lacking and trace.execution.device == "cpu":
        message = f"{type(trace.error).__name__}: {text} This kernel lacks on the CPU; a GPU may have it."
        cures_ = ["inspect on the device that trains", "float32 for this operator, if it is to run here"]
        return Finding(rule, message, cures_, place, precision=precision, level="note")
    if "TorchScript interpreter" in text:
        help_ = ["the module without torch.jit: TorchScript compiles for the types of the first calls, here of float32"]
        return Finding(rule, f"{type(trace.error).__name__}: {text}", help_, place, precision=precision, level="note")
    if "ComplexFloat" in text and "unscale" in text:
        help_ = ["bfloat16 without a scaler, or two real weights: GradScaler takes no complex gradients"]
    elif "without overflow" in text:
        help_ = ["a number that the type holds, such as torch.finfo(x.dtype).min"]
    elif "dtype" in text or "type" in text:
        help_ = ["cast explicitly, for example x.to(y.dtype), where types meet"]
        if op:
            help_ = ["autocast off for this line, with its inputs as .float()"]
        if place is not None and place.function == "backward":
            rule = "custom-function"
            help_ = HELP[rule]
    return Finding(rule, f"{type(trace.error).__name__}: {text}", help_, place, precision=precision)


def nonfinite(
    origin: Origin, precision: str, *, overflow: bool | None, scale: float | None, spoiled: list[str]
) -> Finding:
    """Return the finding for the first place that is not finite; `spoiled` are the buffers that the step left so."""
    rule = "nonfinite-backward" if origin.phase == "backward" else "nonfinite-forward"
    if origin.phase == "before":
        message = f"{origin.module} holds {origin.kind} before the step begins"
        message += f": {origin.count:,} of {origin.values:,} values." if origin.values else "."
    else:
        ranges = "; ".join(describe_range(entry) for entry in origin.inputs[:3]) or "none"
        where = f" of module {origin.module}" if origin.module else ""
        message = (
            f"The first {origin.kind} in {precision} comes out of {origin.op}{where} in the {origin.phase} pass "
            f"(output {origin.output}). Its inputs: {ranges}. It reached {origin.reached or 'the loss'}."
        )
        if scale is not None and origin.phase == "backward":
            message += f" No loss scale from 65536 down to {scale:g} avoids it."
    narrow = "16" in origin.output or any("16" in entry["dtype"] for entry in origin.inputs)
    helpful = cures(origin, overflow=overflow and narrow)
    if spoiled:
        more = f" and {len(spoiled) - 1} more" if len(spoiled) > 1 else ""
        message += f" The step left buffers that are not finite: {spoiled[0]}{more}. Skipping does not undo that."
        helpful.append("put the buffers back as they were if the update is skipped: recipe 23")
    return Finding(rule, message, helpful, origin.place, origin.module, origin.op, precision)


def describe_range(entry: dict[str, Any]) -> str:
    """dtype, shape and range of an input in a few words."""
    shape = "x".join(map(str, entry["shape"])) or "scalar"
    if entry["min"] is None:
        return f"{entry['dtype']} {shape}, nothing finite"
    return f"{entry['dtype']} {shape} from {entry['min']:.4g} to {entry['max']:.4g}"


def range_findings(ranges: dict[str, Any], place_of: dict[str, Place | None]) -> list[Finding]:
    """Activations of a float32 step that float16 cannot hold."""
    limit = torch.finfo(torch.float16).max
    over = [row for row in ranges["activations"] if row["largest"] is not None and row["largest"] > limit]
    if not over:
        return []
    first = over[0]
    count = f"{len(over)} modules put" if len(over) > 1 else "One module puts"
    message = (
        f"{count} out values beyond {limit:,.0f}; the first is {first['name'] or 'the model'} ({first['kind']}) with "
        f"{first['largest']:.4g}. float16 makes them infinite."
    )
    help_ = ["bfloat16, which has float32's range", f"autocast off for {first['name'] or 'this module'}, or a norm"]
    place = place_of.get(first["name"])
    return [Finding("float16-range", message, help_, place, first["name"], precision="amp-fp16")]
