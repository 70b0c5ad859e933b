"""What this machine can do and what to expect of AMP on it: a verdict, its reasons, the evidence, a command.

Times the package's own training update in each precision, in processes that take turns, and says how far a
speed-up can go when only a part of the update gets faster. Knows nothing of options or runs.
"""

from __future__ import annotations

import contextlib
import math
import platform
import shlex
import statistics
import subprocess
import time
from json import dumps
from pathlib import Path
from typing import Any

import torch
import torchvision

from dataset import Batches
from images.opening import Opening, open_data_set
from inspection.probe import OPERATORS, PHASES, Probe, endless, wait
from model import known_model
from precision import card_of, cpu_instructions, sensible_precisions
from precision_table import PRECISIONS, label_of
from reports.text import paragraph, table
from system.cards import EMULATED, NONE, Card
from system.files import refuse_missing_folders, write_text
from system.machine import device_name, linux_memory
from transforms import Preprocess
from utils import RunError, choose_device

ROUNDS = 5
ROUND_SECONDS = 1.0
PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192}  # of a matrix product large enough for the device's full rate
INSTRUCTIONS = (
    "avx2",
    "avx512_f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "neon",
    "sve",
    "bf16",
    "fp16_arith",
)  # as torch.cpu.get_capabilities calls them


def doctor(
    *, device: str, model: str, image_size: int | None, batch_size: int | None, data_dir: str | None, json: str | None
) -> None:
    """The command: prints what this machine can do, and what to expect of AMP on it."""
    refuse_missing_folders(json)
    findings = examine(
        choose_device(device), image_size=image_size, batch_size=batch_size, model_name=model, data_dir=data_dir
    )
    print(report(findings))
    if json:
        write_text(Path(json), dumps(findings, indent=1))


def examine(
    device: torch.device,
    *,
    image_size: int | None = None,
    batch_size: int | None = None,
    model_name: str = "ResNet18",
    data_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Looks at the machine and times the training update; everything found, ready for `report` and for JSON.

    Without `image_size` (pixels) and `batch_size` a CPU is tried with 32 images of 128 pixels, a GPU with as many
    of 256 pixels as fit, up to 256. The loader is timed too where `data_dir` names a data set.
    Raises UserError for an unknown model or wrong data, RunError if not even FP32 runs.
    """
    started = time.perf_counter()
    known_model(model_name)  # an unknown name is refused before anything is measured
    if batch_size is None and device.type == "cuda":  # an FP32 update of ResNet-18 takes 42 MB an image of 256 pixels
        free = 0.6 * torch.cuda.mem_get_info(device)[0]
        batch_size = min(256, 2 ** int(math.log2(max(8, free / (42 * 2**20)))))
    setting: dict[str, Any] = {
        "model_name": model_name,
        "image_size": image_size or (128 if device.type == "cpu" else 256),
        "batch_size": batch_size or 32,
    }
    findings = {"machine": machine(device), "setting": setting, **_measure(device, setting)}
    slowdown = findings["measured"]["fp32"]["float16_slowdown"]
    if slowdown is not None:  # instructions such as avx512_fp16 alone do not make float16 the faster type
        found = findings["machine"]["float16"]
        findings["machine"]["float16"] = f"{found}; a convolution took {slowdown:.1f} times as long as in FP32"
    if data_dir is not None:
        rate = loader_rate(data_dir, device, setting["image_size"], setting["batch_size"])
        findings |= {"data_dir": str(data_dir), "loader_images_per_second": rate}
    findings["ceiling"] = ceilings(findings["measured"])
    return {**findings, **advise(findings), "seconds": round(time.perf_counter() - started, 1)}


def loader_rate(
    data_dir: str | Path, device: torch.device, image_size: int, batch_size: int, seconds: float = 3.0
) -> float:
    """Images per second that the package's loader feeds from `data_dir` when nothing else is done.

    The images are decoded first (once; later runs find them decoded), which is not counted.
    Raises UserError for anything wrong with the data.
    """
    data = open_data_set(
        data_dir, image_size=image_size, seed=0, opening=Opening(pin=device.type == "cuda", own_window=True)
    )
    batches = Batches(data.train, Preprocess(device, image_size), min(batch_size, len(data.train)), len(data.classes))
    updates = endless(batches)
    count = 0
    list(next(updates))  # starts workers and fills caches
    started = time.perf_counter()
    while time.perf_counter() < started + seconds:
        count += sum(len(images) for images, *_ in next(updates))
        wait(device)
    return count / (time.perf_counter() - started)


def machine(device: torch.device) -> dict[str, Any]:
    """What the device is and which types it computes in, by name, as `report` shows it."""
    card = card_of(device)
    found = {"numbers_of": card.family, **_numbers(card)}
    if device.type == "cuda":
        found = {**_cuda(device), **found}
    elif device.type == "cpu":
        found = {"instructions": _instructions(cpu_instructions()), **found}
    return {
        "device": str(device),
        "name": device_name(device),
        **found,
        "memory_gb": round((linux_memory("/proc/meminfo", "MemTotal") or 0) / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _numbers(card: Card) -> dict[str, Any]:
    """The row of docs/cards.md that belongs to a device."""
    pick = "nothing" if card.pick is None else PRECISIONS[card.pick].amp_dtype
    return {
        "float16": card.float16,
        "bfloat16": card.bfloat16,
        "tf32": "available, off unless --tf32" if card.tf32 else "none",
        "float8": "in hardware, not in autocast" if card.float8 else "none",
        "matrix_unit": card.matrix_unit,
        "--amp_picks": f"{pick}: {card.reason}",
    }


def _instructions(flags: set[str]) -> str:
    """Those of a processor's instructions that matter here."""
    return " ".join(name for name in INSTRUCTIONS if name in flags)


def _cuda(device: torch.device) -> dict[str, Any]:
    driver = "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    free, total = torch.cuda.mem_get_info(device)
    return {
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu_memory_gb": round(total / 2**30, 1),
        "gpu_memory_free_gb": round(free / 2**30, 1),
    }


def _measure(device: torch.device, setting: dict[str, Any]) -> dict[str, Any]:
    """The update in each usable precision, each in a process of its own."""
    answers: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    usable = sensible_precisions(device)
    # On a CPU the processes take turns, so that noise hits all alike; a GPU's memory may hold one at a time only.
    for group in [[name] for name in usable] if device.type == "cuda" else [usable]:
        answers |= _take_turns(group, {"device": str(device), **setting}, failed)
    if "fp32" in failed:
        raise RunError(
            f"the training update failed in FP32: {failed['fp32']}\nTry a smaller --batch_size or --image_size."
        )
    measured = {name: _summary(found, answers["fp32"], setting["batch_size"]) for name, found in answers.items()}
    return {"measured": measured, "failed": failed}


def _take_turns(names: list[str], request: dict[str, Any], failed: dict[str, str]) -> dict[str, dict[str, Any]]:
    """All answers of one process per precision; a process that fails is left out and its reason kept."""
    probes = {name: Probe(precision=name, **request) for name in names}
    answers: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in names}

    def ask_all(question: str, **arguments: Any) -> dict[str, dict[str, Any]]:
        found = {}
        for name in [name for name in names if name not in failed]:
            try:
                found[name] = probes[name].ask(question, **arguments)
            except RunError as error:
                failed[name] = str(error)
        return found

    try:
        slowest = max([turn["seconds"] for turn in ask_all("warm_up").values()], default=1.0)
        for _ in range(ROUNDS if slowest < 6 else 2):
            for name, turn in ask_all("round", updates=int(min(50, max(1, ROUND_SECONDS / slowest)))).items():
                answers[name]["rounds"].append(turn)
        size = PRODUCT_SIZE["cpu" if request["device"] == "cpu" else "gpu"]
        for name, details in ask_all("details", size=size).items():
            answers[name] |= details
    finally:
        for probe in probes.values():
            probe.close()
    return {name: answers[name] for name in names if name not in failed}


def _summary(answers: dict[str, Any], reference: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Medians over the rounds; the speed-up is the median of the ratios of neighbouring rounds."""
    rounds = answers["rounds"]
    memory = answers["memory"]
    ours, theirs = ([turn["seconds"] / turn["updates"] for turn in turns] for turns in (rounds, reference["rounds"]))
    median = statistics.median(ours)
    phases = {name: statistics.median(turn["phases"][name] / turn["updates"] for turn in rounds) for name in PHASES}
    return {
        **answers,
        "images_per_second": batch_size / median,
        "seconds_per_update": median,
        "speedup": statistics.median(one / other for one, other in zip(theirs, ours, strict=False)),
        "spread": (max(ours) - min(ours)) / median,
        "phase_seconds": phases,
        "phase_shares": {name: seconds / sum(phases.values()) for name, seconds in phases.items()},
        "training_mb": memory["peak_memory_mb"] - memory["before_mb"],
        "joules_per_image": _joules(rounds, batch_size),
    }


def _joules(rounds: list[dict[str, Any]], batch_size: int) -> float | None:
    """Joules for one image: the median over rounds; None if nothing counts them."""
    counted = [turn["joules"] / turn["updates"] for turn in rounds if turn.get("joules") is not None]
    return statistics.median(counted) / batch_size if counted else None


def amdahl(share: float, speedup: float) -> float:
    """Speed-up of the whole where only a part, `share` of the old time, gets faster by `speedup`: 1 / (1 - f + f/s).

    Source: G. M. Amdahl, "Validity of the single processor approach to achieving large scale computing
    capabilities", AFIPS 1967.
    """
    return 1 / (1 - share + share / speedup)


def ceilings(measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each precision but FP32: f (of the whole update, data included), s, the ceiling that follows from them, and
    how much faster the update's own matrix products and convolutions became."""
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
    """The verdict, the reasons for it, and the command to copy, from the numbers alone.

    AMP is recommended where it is 5 % faster, or about as fast and 15 % smaller.
    """
    measured = findings["measured"]
    speedups = {name: row["speedup"] for name, row in measured.items()}
    best = max((name for name in measured if name.startswith("amp")), key=lambda name: speedups[name], default=None)
    recommended = "fp32"
    reasons = [_hardware_reason(findings["machine"])]
    verdict = "AMP cannot be used on this device; train in FP32."
    if best:
        speedup = speedups[best]
        saving = measured[best]["training_mb"] / measured["fp32"]["training_mb"]
        if speedup >= 1.05 or (speedup >= 0.95 and saving <= 0.85):
            recommended = best
        effect = "pays" if speedup >= 1.05 else "brings no speed" if speedup > 0.95 else "is slower"
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
            else "no Tensor Cores: 16-bit products are no faster, though activations take half the memory."
        )
    if has["bfloat16"] == EMULATED:
        return "bfloat16 is imitated with FP32 on this processor, so that only memory traffic shrinks."
    return f"bfloat16 is computed natively{', in the AMX matrix unit' * (has.get('matrix_unit') == 'AMX')}."


def _amp_reasons(findings: dict[str, Any], best: str, saving: float) -> list[str]:
    row = findings["measured"][best]
    top = findings["ceiling"][best]
    reasons = [
        f"Matrix products and convolutions take {top['f']:.0%} of an FP32 update. A large product runs {top['s']:.1f} "
        f"times as fast in 16 bits, which allows {top['ceiling']:.2f} if nothing else gets faster; those of this model "
        f"ran {top['gained']:.1f} times as fast, and are {row['shares']['products']:.0%} of the AMP update."
    ]
    if row["busy"] is not None and row["busy"] < 0.8:
        reasons.append(
            f"The GPU computes in {row['busy']:.0%} of an AMP update and waits for the next kernel "
            "otherwise. A larger --batch_size or --compile would let AMP show more."
        )
    if saving > 0.8:
        reasons.append(
            "Memory falls little: weights, gradients and Adam's two moments stay FP32, and autocast adds "
            "16-bit copies of the weights. Only activations shrink, so a larger batch or image saves more."
        )
    loader = findings.get("loader_images_per_second")
    rate = row["images_per_second"]
    if loader is not None:
        reasons.append(
            f"The loader feeds {loader:,.0f} images/s and AMP computes {rate:,.0f}: "
            + (
                "training waits for data, and no precision helps with that. Keep the images decoded (--cache memory) "
                "or use more --num_workers."
                if loader < 1.1 * rate
                else "data is not the limit."
            )
        )
    return reasons


def _command(findings: dict[str, Any], name: str) -> str:
    """The training command for precision `name`, at the size that was timed."""
    setting = findings["setting"]
    device = torch.device(findings["machine"]["device"])
    words = ["python main.py"] + ["--tf32"] * (name == "tf32") + ["--amp"] * name.startswith("amp")
    if name == "amp-bf16" and device.type == "cuda":
        words.append("--amp_dtype bfloat16")
    if device.type == "cpu" and torch.cuda.is_available():
        words.append("--device cpu")
    if setting["model_name"].lower() != "resnet18":
        words.append(f"--model {setting['model_name']}")
    words += [f"--{option} {setting[option]}" for option in ("image_size", "batch_size")]
    if "data_dir" in findings:
        words.append(f"--data_dir {shlex.quote(findings['data_dir'])}")
    return " ".join(words)


def _energy_line(measured: dict[str, Any]) -> list[str]:
    """What an image costs in joules; nothing where nothing counts them."""
    counted = {name: row.get("joules_per_image") for name, row in measured.items()}
    if None in counted.values():
        return []
    text = ", ".join(f"{joules:.3g} J in {label_of(name)}" for name, joules in counted.items())
    return paragraph(f"Energy of one image, by the machine's own counter: {text}.", "  ")


def report(findings: dict[str, Any]) -> str:
    """The findings as text of at most 80 columns: verdict, reasons, evidence, the command to copy."""
    setting = findings["setting"]
    measured = findings["measured"]
    loader = findings.get("loader_images_per_second")
    turns = measured["fp32"]["rounds"]
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
        [["", "images/s", "speed-up", "memory", *PHASES]]
        + [
            [
                label_of(name),
                f"{row['images_per_second']:,.1f}",
                f"{row['speedup']:.2f}",
                f"{row['training_mb']:,.0f}",
                *(f"{row['phase_shares'][phase]:.1%}" for phase in PHASES),
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
        [["", *OPERATORS, "other", "s", "ceiling"]]
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
