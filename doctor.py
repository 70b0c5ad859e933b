"""What this machine can do and what to expect of AMP on it: a verdict, its reasons, the evidence, a command.

Times the package's own training update in each precision, in processes that take turns, and says how far a
speed-up can go when only a part of the update gets faster. Knows nothing of options or runs.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from precision import Precision, choose_precision, gives_nan_in_float16, sensible_precisions
from probe import PHASES, Probe
from utils import RunError, device_name

ROUNDS, ROUND_SECONDS = 5, 1.0
# Large enough to run at the device's full rate.
KERNELS = {"cpu": {"size": 2048, "images": 32}, "gpu": {"size": 8192, "images": 256}}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "asimd", "bf16", "fphp")
_AVAILABLE = {True: "native", False: "emulated"}


def examine(
    device: torch.device, *, image_size: int | None = None, batch_size: int | None = None,
    model_name: str = "ResNet18", data_dir: str | Path | None = None, log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Looks at the machine and times the training update; everything found, ready for `report` and for JSON.

    Without `image_size` (pixels) and `batch_size` a CPU is tried with 32 images of 128 pixels, a GPU with as many
    of 256 pixels as fit, up to 256. The loader is timed too where `data_dir` names a data set.
    Raises UserError for an unknown model or wrong data, RunError where not even FP32 runs.
    """
    started = time.perf_counter()
    _check_model(model_name)
    setting = {"model_name": model_name, "image_size": image_size or (128 if device.type == "cpu" else 256),
               "batch_size": batch_size or _default_batch(device)}
    findings: dict[str, Any] = {"machine": machine(device), "setting": setting, **_measure(device, setting, log)}
    if data_dir is not None:
        log("measuring the loader")
        findings["loader_images_per_second"] = loader_rate(
            data_dir, device=device, image_size=setting["image_size"], batch_size=setting["batch_size"], log=log
        )
    findings["ceiling"] = ceilings(findings["measured"])
    findings |= advise(findings)
    return {**findings, "seconds": round(time.perf_counter() - started, 1)}


def _default_batch(device: torch.device) -> int:
    """256 as in the seed's recipe, or what fits: an FP32 update of ResNet-18 takes 42 MB an image of 256 pixels."""
    if device.type != "cuda":
        return 32
    images = 0.6 * torch.cuda.mem_get_info(device)[0] / (42 * 2**20)
    return max(size for size in (8, 16, 32, 64, 128, 256) if size == 8 or size <= images)


def loader_rate(
    data_dir: str | Path, *, device: torch.device, image_size: int, batch_size: int, seconds: float = 3.0,
    log: Callable[[str], None] = lambda line: None, **options: Any,
) -> float:
    """Images per second that the package's loader feeds from `data_dir` when nothing else is done.

    The images are decoded first (once; later runs find them decoded), which is not counted.
    `options` go to `dataset.open_data_set`. Raises UserError for anything wrong with the data.
    """
    from dataset import Batches, Pixels, open_data_set

    data = open_data_set(data_dir, image_size=image_size, seed=0, pin=device.type == "cuda", log=log, **options)
    batches = Batches(data.train, Pixels(device, image_size), min(batch_size, len(data.train)), len(data.classes))
    count, begun = 0, None
    for epoch in range(1000):
        for pieces in batches.epoch(epoch):
            for images, *_ in pieces:
                count += len(images) if begun is not None else 0
            if begun is None:  # the first batch starts workers and fills caches
                begun = time.perf_counter()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if count and time.perf_counter() - begun > seconds:
                return count / (time.perf_counter() - begun)
    return count / (time.perf_counter() - begun)


def _check_model(name: str) -> None:
    from model import build_model

    with torch.device("meta"):
        build_model(name, 2, pretrained=False)


# --------------------------------------------------------------------------------- the machine
def machine(device: torch.device) -> dict[str, Any]:
    """What the device is and which 16-bit types it computes in, as a table of plain values."""
    import torchvision

    found = {
        "device": str(device), "name": device_name(device), "system": platform.platform(),
        "python": platform.python_version(), "torch": str(torch.__version__), "torchvision": torchvision.__version__,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(), "memory_gb": round(_memory("MemTotal") / 2**30, 1),
        "memory_available_gb": round(_memory("MemAvailable") / 2**30, 1),
    }
    if device.type == "cuda":
        return found | _cuda(device)
    if device.type == "cpu":
        return found | _cpu(_cpu_flags(), torch.backends.cpu.get_cpu_capability())
    return found | {"float16": "native", "bfloat16": "unknown", "tensor_cores": False}


def _cpu(flags: set[str], capability: str) -> dict[str, Any]:
    """`flags` are those of /proc/cpuinfo; oneDNN has the instructions or imitates them with float32."""
    return {
        "capability": capability, "flags": [flag for flag in FLAGS if flag in flags],
        "onednn": torch.backends.mkldnn.is_available(),
        "bfloat16": _AVAILABLE[bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})],
        "float16": _AVAILABLE[bool(flags & {"avx512_fp16", "amx_fp16", "fphp"})],
        "tensor_cores": bool(flags & {"amx_bf16"}), "tf32": "none", "gtx16": False,
    }


def _cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return set(line.split(":", 1)[1].split())
    return set()


def _cuda(device: torch.device) -> dict[str, Any]:
    """Tensor Cores came with compute capability 7.0, bfloat16 and TF32 with 8.0; GTX 16xx (7.5) have none."""
    properties, gtx16 = torch.cuda.get_device_properties(device), gives_nan_in_float16(device)
    capability = (properties.major, properties.minor)
    choose_precision(device)  # as training without --tf32 sets it
    ampere = capability >= (8, 0)
    return {
        "capability": f"{properties.major}.{properties.minor}", "driver": _driver(), "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "multiprocessors": properties.multi_processor_count,
        "gpu_memory_gb": round(properties.total_memory / 2**30, 1),
        "gpu_memory_free_gb": round(torch.cuda.mem_get_info(device)[0] / 2**30, 1),
        "float16": "faulty" if gtx16 else _AVAILABLE[capability >= (5, 3)],
        "bfloat16": _AVAILABLE[torch.cuda.is_bf16_supported(including_emulation=False)],
        "tensor_cores": capability >= (7, 0) and not gtx16, "gtx16": gtx16,
        "tf32": "available, off unless --tf32" if ampere else "none",
        "fp32_precision": {"convolution": torch.backends.cudnn.conv.fp32_precision,
                           "matrix_product": torch.backends.cuda.matmul.fp32_precision},
    }


def _driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return found.stdout.split()[0] if found.stdout.split() else "unknown"
    return "unknown"


def _memory(name: str) -> int:
    """Bytes under `name` in /proc/meminfo, 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


# ----------------------------------------------------------------------------- the measurements
def _measure(device: torch.device, setting: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """The update in each usable precision, each in a process of its own."""
    usable, failed, taken = _usable(device), {}, {}
    # On a CPU the processes take turns, so that noise hits all alike; a GPU's memory may hold one at a time only.
    for group in [[name] for name in usable] if device.type == "cuda" else [usable]:
        log(f"timing the training update: {', '.join(group)}")
        taken |= _take_turns(group, {"device": str(device), **setting}, failed)
    if "fp32" in failed:
        raise RunError(
            f"the training update failed in FP32: {failed['fp32']}\nTry a smaller --batch_size or --image_size."
        )
    measured = {name: _summary(answers, taken["fp32"], setting["batch_size"]) for name, answers in taken.items()}
    return {"measured": measured, "failed": failed, "float16_on_cpu": taken["fp32"].get("float16")}


def _take_turns(names: list[str], request: dict[str, Any], failed: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Every answer of one process per precision; a process that fails is left out and its reason kept."""
    probes: dict[str, Probe] = {}
    answers: dict[str, dict[str, Any]] = {name: {"rounds": [], "kernels": []} for name in names}

    def ask_all(question: str, **arguments: Any) -> dict[str, Any]:
        found = {}
        for name in [name for name in names if name not in failed]:
            try:
                found[name] = probes[name].ask(question, **arguments)
            except RunError as error:
                failed[name] = str(error)
        return found

    try:
        for name in names:
            probes[name] = Probe(precision=name, **request)
        slowest = max([turn["seconds"] for turn in ask_all("warm_up").values()], default=1.0)
        for _ in range(ROUNDS if slowest < 6 else 1):
            for name, turn in ask_all("round", updates=int(min(50, max(1, ROUND_SECONDS / slowest)))).items():
                answers[name]["rounds"].append(turn)
        for _ in range(2):
            for name, rates in ask_all("kernels", **KERNELS["cpu" if request["device"] == "cpu" else "gpu"]).items():
                answers[name]["kernels"].append(rates)
        questions = ["memory", "profile"] + ["float16"] * (request["device"] == "cpu")
        for question in questions:  # memory was read off before anything but updates ran
            for name, answer in ask_all(question).items():
                answers[name][question] = answer
    finally:
        for probe in probes.values():
            probe.close()
    return {name: answers[name] for name in names if name not in failed}


def _usable(device: torch.device) -> list[str]:
    names = sensible_precisions(device)
    return [name for name in names if name != "amp-fp16" or not gives_nan_in_float16(device)]


def _summary(answers: dict[str, Any], reference: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Medians over the rounds; the speed-up is the median of the ratios of neighbouring rounds."""
    rounds, memory = answers["rounds"], answers["memory"]
    seconds = [turn["seconds"] / turn["updates"] for turn in rounds]
    ratios = [theirs["seconds"] / theirs["updates"] / ours
              for theirs, ours in zip(reference["rounds"], seconds, strict=False)]
    median = statistics.median(seconds)
    phases = {name: statistics.median(turn["phases"][name] / turn["updates"] for turn in rounds) for name in PHASES}
    total = sum(phases.values())
    before = 0.0 if memory["memory_kind"].startswith("CUDA") else memory["before_mb"]
    return {
        "images_per_second": batch_size / median, "seconds_per_update": median, "speedup": statistics.median(ratios),
        "spread": (max(seconds) - min(seconds)) / median, "rounds": len(rounds), "updates": rounds[0]["updates"],
        "phase_seconds": phases, "phase_shares": {name: value / total for name, value in phases.items()},
        "memory": memory, "training_mb": memory["peak_memory_mb"] - before, **answers["profile"],
        "tflops": {name: max(rates[name] for rates in answers["kernels"]) for name in answers["kernels"][0]},
    }


# ------------------------------------------------------------------------------------ the ceiling
def amdahl(parts: list[tuple[float, float]]) -> float:
    """Speed-up of the whole where each part (share of the old time, own speed-up) gets faster.

    Amdahl's law for several parts, 1 / (1 - sum f + sum f/s); with one part 1 / ((1 - f) + f/s).
    Source: G. M. Amdahl, "Validity of the single processor approach to achieving large scale computing
    capabilities", AFIPS 1967; the form with several parts as in Hennessy and Patterson, section 1.9.
    """
    return 1 / (1 - sum(share for share, _ in parts) + sum(share / speedup for share, speedup in parts))


def ceilings(measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each AMP precision: f, s, and the two ceilings that follow, over the whole update, data included."""
    reference = measured["fp32"]
    computing = 1 - reference["phase_shares"]["data"]
    share, light = (reference["shares"][kind] * computing for kind in ("products", "activations"))
    found = {}
    for name, row in measured.items():
        if name != "fp32":
            speedup = max(row["tflops"][kind] / reference["tflops"][kind] for kind in row["tflops"])
            halved = 2.0 if name.startswith("amp") else 1.0  # TF32 still stores 32 bits
            found[name] = {"share": share, "speedup": speedup, "products_only": amdahl([(share, speedup)]),
                           "activation_share": light, "with_halved_bytes": amdahl([(share, speedup), (light, halved)])}
    return found


# -------------------------------------------------------------------------------------- the advice
def advise(findings: dict[str, Any]) -> dict[str, Any]:
    """The verdict, the reasons for it, and the command to copy, from the numbers alone."""
    measured = findings["measured"]
    amp = {name: row["speedup"] for name, row in measured.items() if name.startswith("amp")}
    best_amp = max(amp, key=amp.get) if amp else None
    fastest = max(measured, key=lambda name: measured[name]["speedup"])
    saving = measured[best_amp]["training_mb"] / measured["fp32"]["training_mb"] if best_amp else 1.0
    if best_amp and (amp[best_amp] >= 1.05 or (amp[best_amp] >= 0.95 and saving <= 0.85)):
        fastest = best_amp if measured[fastest]["speedup"] < 1.02 * amp[best_amp] or fastest == "fp32" else fastest
    elif measured[fastest]["speedup"] < 1.05:
        fastest = "fp32"
    return {"recommended": fastest, "verdict": _verdict(best_amp, amp, saving, fastest),
            "reasons": _reasons(findings, best_amp, saving), "command": _command(findings, fastest)}


def _verdict(best_amp: str | None, amp: dict[str, float], saving: float, fastest: str) -> str:
    if best_amp is None:
        return "AMP cannot be used on this device; train in FP32."
    speedup, label = amp[best_amp], _label(best_amp)
    memory = f"{saving:.0%} of its memory"
    if speedup >= 1.05:
        text = f"AMP pays here: {label} trains {speedup:.2f} times as fast as FP32, in {memory}."
    elif speedup > 0.95:
        text = f"AMP brings no speed here ({label}: {speedup:.2f} times FP32), and takes {memory}."
    else:
        text = f"AMP is slower here: {label} runs at {speedup:.2f} times FP32's speed, in {memory}."
    return text if fastest in (best_amp, "fp32") else text + " TF32 is the fastest."


def _reasons(findings: dict[str, Any], best_amp: str | None, saving: float) -> list[str]:
    has, reference = findings["machine"], findings["measured"]["fp32"]
    reasons = _hardware_reasons(has, findings)
    if best_amp:
        row, top = findings["measured"][best_amp], findings["ceiling"][best_amp]
        reasons.append(
            f"Matrix products and convolutions take f = {top['share']:.0%} of an FP32 update, and by themselves run "
            f"s = {top['speedup']:.2f} times as fast in 16 bits: that alone allows {top['products_only']:.2f}. Where "
            f"the other operators on activations ({top['activation_share']:.0%}) halve their time with their bytes, "
            f"{top['with_halved_bytes']:.2f}. Measured: {row['speedup']:.2f}."
        )
        if row["busy"] is not None and row["busy"] < 0.8:
            reasons.append(
                f"The GPU computes in {row['busy']:.0%} of an AMP update and waits for the next kernel otherwise. "
                "A larger --batch_size or --compile would let AMP show more."
            )
        if saving > 0.8:
            reasons.append(
                "Memory falls little: weights, gradients and Adam's two moments stay FP32, and autocast adds 16-bit "
                "copies of the weights. Only activations shrink, so a larger batch or image shows more saving."
            )
        reasons += _data_reasons(findings, row)
    if reference["spread"] > 0.3:
        reasons.insert(0, f"The rounds differ by {reference['spread']:.0%}: something else uses this machine. Take the "
                          "figures as rough, or ask again when it is quiet.")
    reasons += [f"{name} could not be measured: {reason}" for name, reason in findings["failed"].items()]
    return reasons


def _hardware_reasons(has: dict[str, Any], findings: dict[str, Any]) -> list[str]:
    if has["device"].startswith("cuda"):
        if has["gtx16"]:
            return ["Cards of the GTX 16 series are known to give NaN in float16 and have no Tensor Cores."]
        if not has["tensor_cores"]:
            return [f"Compute capability {has['capability']} has no Tensor Cores (they came with 7.0): 16-bit products "
                    "are no faster than FP32, though activations take half the memory."]
        return [f"Compute capability {has['capability']} has Tensor Cores, which multiply 16-bit numbers several times "
                "as fast as FP32."]
    if not has["device"].startswith("cpu"):
        return []
    native = has["bfloat16"] == "native"
    flag = next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in has["flags"]), None)
    reasons = [f"This CPU multiplies bfloat16 natively ({flag})." if native else
               "This CPU has no bfloat16 instructions: bfloat16 is imitated with FP32, so only memory traffic shrinks."]
    slow = (findings.get("float16_on_cpu") or {}).get("slowdown")
    if slow is not None and slow > 2:
        reasons.append(f"float16 on this CPU is emulated: a convolution takes {slow:.0f} times as long as in FP32. It "
                       "is fit for small tests of the GradScaler only, and was not timed in full.")
    return reasons


def _data_reasons(findings: dict[str, Any], row: dict[str, Any]) -> list[str]:
    loader = findings.get("loader_images_per_second")
    if loader is None:
        return []
    rate = row["images_per_second"]
    if loader < 1.1 * rate:
        return [f"The loader feeds {loader:,.0f} images/s and AMP computes {rate:,.0f}: training waits for data, and "
                "no precision helps with that. Keep the images decoded (--cache memory) or use more --num_workers."]
    return [f"The loader feeds {loader:,.0f} images/s, {loader / rate:.0f} times what AMP computes: data is not the "
            "limit."]


def _command(findings: dict[str, Any], name: str) -> str:
    """The training command for precision `name`, with the largest batch up to 256 that fits in memory."""
    has, setting = findings["machine"], findings["setting"]
    device = torch.device(has["device"])
    words = ["python main.py"]
    if name == "tf32":
        words.append("--tf32")
    elif name.startswith("amp"):
        words.append("--amp")
        dtype = {"amp-fp16": "float16", "amp-bf16": "bfloat16"}[name]
        if dtype != ("float16" if device.type == "cuda" else "bfloat16"):
            words.append(f"--amp_dtype {dtype}")
    if device.type == "cpu" and torch.cuda.is_available():
        words.append("--device cpu")
    if setting["model_name"].lower() != "resnet18":
        words.append(f"--model {setting['model_name']}")
    return " ".join([*words, f"--image_size {setting['image_size']}", f"--batch_size {fitting_batch(findings, name)}"])


def fitting_batch(findings: dict[str, Any], name: str) -> int:
    """Largest power of two up to 256, or the batch tried if that is larger, using 70 % of the free memory.

    Weights, gradients and Adam's moments take four times the parameters whatever the batch; the rest of the
    measured peak grows with it.
    """
    tried, row = findings["setting"]["batch_size"], findings["measured"][name]
    fixed = 4 * row["memory"]["parameters_mb"]
    per_image = max(row["training_mb"] - fixed, 0.1) / tried
    has = findings["machine"]
    free = 1024 * has.get("gpu_memory_free_gb", has["memory_available_gb"])
    fitting = [2**power for power in range(9) if fixed + 2**power * per_image <= 0.7 * free]
    return max([tried, *fitting])


# -------------------------------------------------------------------------------------- the text
def report(findings: dict[str, Any]) -> str:
    """The findings as text of at most 80 columns: verdict, reasons, evidence, the command to copy."""
    lines = [*_wrapped(findings["verdict"]), "", "Why"]
    for reason in findings["reasons"]:
        lines += _wrapped(reason, "- ")
    lines += ["", "The machine", *_machine_lines(findings["machine"]), "", *_table_lines(findings), ""]
    lines += _ceiling_lines(findings)
    lines += ["", "To copy", f"  {findings['command']}", ""]
    setting, row = findings["setting"], findings["measured"][findings["recommended"]]
    minutes = 10_000 / row["images_per_second"] / 60
    lines += _wrapped(
        f"At these {setting['image_size']} pixels an epoch of 10,000 images takes about {minutes:.1f} min; time and "
        f"activations grow with the square of --image_size. (This took {findings.get('seconds', 0):.0f} s.)"
    )
    return "\n".join(lines)


def _wrapped(text: str, mark: str = "") -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=mark, subsequent_indent=" " * len(mark),
                         break_long_words=True, break_on_hyphens=False)


def _machine_lines(has: dict[str, Any]) -> list[str]:
    rows = [("device", has["name"]),
            ("compute capability" if "driver" in has else "torch's kernels for", has.get("capability")),
            ("driver, CUDA, cuDNN", has.get("driver") and f"{has['driver']}, {has['cuda']}, {has['cudnn']}"),
            ("instructions", " ".join(has.get("flags", []))),
            ("bfloat16 / float16", f"{has['bfloat16']} / {has['float16']}"),
            ("Tensor Cores" if "driver" in has else "matrix units (AMX)", "yes" if has["tensor_cores"] else "none"),
            ("TF32", has.get("tf32") if "driver" in has else None),
            ("GPU memory", "driver" in has and f"{has['gpu_memory_gb']} GB, {has['gpu_memory_free_gb']} GB free"),
            ("memory", f"{has['memory_gb']} GB, {has['memory_available_gb']} GB available"),
            ("cores, torch threads", f"{has['cores']}, {has['threads']}"),
            ("versions", f"Python {has['python']}, torch {has['torch']}, torchvision {has['torchvision']}")]
    lines = []
    for name, value in rows:
        if value:
            lines += textwrap.wrap(f"{value}", 80, initial_indent=f"  {name:<22}", subsequent_indent=" " * 24)
    return lines


def _table_lines(findings: dict[str, Any]) -> list[str]:
    setting, measured = findings["setting"], findings["measured"]
    kind = measured["fp32"]["memory"]["memory_kind"]
    lines = _wrapped(
        f"The training update: {setting['model_name']}, {setting['batch_size']} images of {setting['image_size']} "
        f"pixels, median of {measured['fp32']['rounds']} rounds of {measured['fp32']['updates']} update"
        f"{'s' * (measured['fp32']['updates'] > 1)}"
    )
    lines.append(f"  {'':<13}{'images/s':>9}{'speed-up':>9}{'memory MB':>11}   {'data':>6}{'forward':>9}"
                 f"{'backward':>10}{'optim.':>8}")
    for name, row in measured.items():
        data, forward, backward, optimizer = (f"{row['phase_shares'][phase]:.1%}" for phase in PHASES)
        speed = f"{row['images_per_second']:>9,.1f}{row['speedup']:>9.2f}"
        lines.append(f"  {_label(name):<13}{speed}{row['training_mb']:>11,.0f}   {data:>6}{forward:>9}{backward:>10}"
                     f"{optimizer:>8}")
    explained = ("the allocator's peak" if kind.startswith("CUDA") else
                 "the process's peak beyond what it held before the model was made")
    lines += _wrapped(f"Memory is {explained}.", "  ")
    loader = findings.get("loader_images_per_second")
    if loader is not None:
        lines += _wrapped(f"The loader by itself, from the data set: {loader:,.0f} images/s.", "  ")
    return lines


def _ceiling_lines(findings: dict[str, Any]) -> list[str]:
    lines = ["How far a speed-up can go (Amdahl's law)"]
    lines += _wrapped(
        "1 / ((1 - f) + f/s): f is the share of an FP32 update spent in matrix products and convolutions, s their own "
        "speed-up on a large product or convolution. The rest, 1 - f, keeps its time; in the second column operators "
        "on activations take half of it, because 16-bit activations are half the bytes. The last two columns are the "
        "rates s comes from, in TFLOP/s.", "  ")
    header = f"{'f':>5}{'s':>6}{'ceiling':>9}{'half bytes':>12}{'measured':>10}{'product':>12}{'conv.':>7}"
    lines.append(" " * 15 + header)
    for name, row in findings["measured"].items():
        top, tflops = findings["ceiling"].get(name), row["tflops"]
        cells = (f"{top['share']:>5.0%}{top['speedup']:>6.2f}{top['products_only']:>9.2f}"
                 f"{top['with_halved_bytes']:>12.2f}{row['speedup']:>10.2f}" if top else " " * 42)
        own = f"{tflops['matrix_product']:>12.3g}{tflops['convolution']:>7.3g}"
        lines.append(f"  {_label(name):<13}{cells}{own}")
    return lines


def _label(name: str) -> str:
    return Precision(name, torch.device("cpu"), "").label
