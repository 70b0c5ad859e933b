"""Report what this machine can do and what to expect of AMP on it: a verdict, reasons, figures, a command.

Times the program's own training update in each precision, in processes that take turns. measuring/advice.py draws the
conclusions.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ampscope.timing import wait
from command_line.groups import Examination
from dataset import Batches
from images.opening import Opening, open_data_set
from images.stores import StreamedImages
from measuring.advice import advise, ceilings
from measuring.arithmetic import check
from measuring.hardware import machine
from measuring.probe import (
    PHASES,
    PRODUCT_SIZE,
    ROUNDS,
    Probe,
    batch_that_fits,
    endless,
    update_seconds,
    updates_of_a_round,
    what_may_help,
)
from model import known_model
from precision import sensible_precisions
from reports.doctor import doctor_text
from system.files import json_text, refuse_missing_folders, write_text
from transforms import Preprocess
from utils import RunError, UserError, choose_device, printable


def doctor(asked: Examination) -> None:
    """Print what this machine can do and what to expect of AMP on it, or with --ladder what each step brings."""
    device = choose_device(asked.device)
    if asked.ladder:
        climb_and_report(device, Path(asked.out), asked.model, asked.image_size or 256, asked.batch_size or 256)
        return
    refuse_missing_folders(asked.json)
    findings = examine(
        device,
        image_size=asked.image_size,
        batch_size=asked.batch_size,
        model_name=asked.model,
        data_dir=asked.data_dir,
    )
    print(doctor_text(findings))
    if asked.json:
        write_text(Path(asked.json), json_text(findings, indent=1))


def examine(
    device: torch.device,
    *,
    image_size: int | None = None,
    batch_size: int | None = None,
    model_name: str = "ResNet18",
    data_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Examine the machine and time the training update; return the findings for `doctor_text` and for JSON.

    The defaults are 32 images of 128 pixels on a CPU, and on a GPU as many of 256 pixels as fit, up to 256. With
    `data_dir`, time the data loader as well. Raise UserError for an unknown model or wrong data, RunError if not even
    FP32 runs.
    """
    started = time.perf_counter()
    known_model(model_name)  # an unknown name is refused before anything is measured
    image_size = image_size or (128 if device.type == "cpu" else 256)
    batch_size = batch_size or batch_that_fits(device, image_size, 256)
    setting: dict[str, Any] = {"model_name": model_name, "image_size": image_size, "batch_size": batch_size}
    findings = {"machine": machine(device), "setting": setting, **_measure(device, setting)}
    slowdown = findings["measured"]["fp32"]["float16_slowdown"]
    if slowdown is not None:  # instructions such as avx512_fp16 alone do not make float16 the faster type
        found = findings["machine"]["float16"]
        findings["machine"]["float16"] = f"{found}; a convolution took {slowdown:.1f} times as long as in FP32"
    if data_dir is not None:
        rate, streamed = loader_rate(data_dir, device, setting["image_size"], setting["batch_size"])
        findings |= {"data_dir": str(data_dir), "loader_images_per_second": rate, "loader_streams": streamed}
    findings["ceiling"] = ceilings(findings["measured"])
    findings["arithmetic"] = {str(dtype)[6:]: check(device, dtype) for dtype in (torch.bfloat16, torch.float16)}
    return {**findings, **advise(findings), "seconds": round(time.perf_counter() - started, 1)}


def climb_and_report(device: torch.device, folder: Path, model_name: str, image_size: int, batch_size: int) -> None:
    """Measure the ladder, print its table, and write ladder.json, ladder.md and ladder.png into `folder`.

    Raise UserError for an unknown model, or a folder that cannot be written.
    """
    from measuring.ladder import climb
    from reports.ladder import ladder_markdown, ladder_picture, ladder_text  # matplotlib takes a second

    known_model(model_name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{printable(folder)} cannot be made ({error.strerror}): name another with --out.") from None
    found = climb(device, model_name=model_name, image_size=image_size, batch_size=batch_size)
    print("\n" + ladder_text(found))
    write_text(folder / "ladder.json", json_text(found, indent=1))
    write_text(folder / "ladder.md", ladder_markdown(found))
    ladder_picture(found, folder / "ladder.png")
    print(f"\nresults: {folder}")


def loader_rate(
    data_dir: str | Path, device: torch.device, image_size: int, batch_size: int, seconds: float = 3.0
) -> tuple[float, bool]:
    """Return the data loader's images/s when nothing else runs, and True if it decodes images again in each epoch.

    Decoding into the cache comes first and is not counted. Raise UserError if anything is wrong with the data.
    """
    data = open_data_set(
        data_dir,
        image_size=image_size,
        seed=0,
        opening=Opening(pin=device.type == "cuda", skip_unreadable=True, own_window=True),
    )
    batches = Batches(data.train, Preprocess(device, image_size), min(batch_size, len(data.train)), len(data.classes))
    updates = endless(batches)
    count = 0
    list(next(updates))  # starts workers and fills caches
    started = time.perf_counter()
    while time.perf_counter() < started + seconds:
        count += sum(len(images) for images, *_ in next(updates))
        wait(device)
    return count / (time.perf_counter() - started), isinstance(data.train.store, StreamedImages)


def _measure(device: torch.device, setting: dict[str, Any]) -> dict[str, Any]:
    """Time the update in each usable precision, each in a process of its own."""
    answers: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    usable = sensible_precisions(device)
    # On a CPU the processes take turns, so that noise hits all alike; a GPU's memory may hold one at a time only.
    for group in [[name] for name in usable] if device.type == "cuda" else [usable]:
        answers |= _take_turns(group, {"device": str(device), **setting}, failed)
    if "fp32" in failed:
        raise RunError(f"the training update failed in FP32: {failed['fp32']}{what_may_help(failed['fp32'])}")
    measured = {name: _summary(found, answers["fp32"], setting["batch_size"]) for name, found in answers.items()}
    return {"measured": measured, "failed": failed}


def _take_turns(names: list[str], request: dict[str, Any], failed: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the answers of one process per precision; leave out one that fails and put its reason into `failed`."""
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
            for name, turn in ask_all("round", updates=updates_of_a_round(slowest)).items():
                answers[name]["rounds"].append(turn)
        size = PRODUCT_SIZE["cpu" if request["device"] == "cpu" else "gpu"]
        for name, details in ask_all("details", size=size).items():
            answers[name] |= details
    finally:
        for probe in probes.values():
            probe.close()
    return {name: answers[name] for name in names if name not in failed}


def _summary(answers: dict[str, Any], reference: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Return medians over the rounds; the speed-up is the median of the ratios of neighbouring rounds."""
    rounds = answers["rounds"]
    memory = answers["memory"]
    ours = update_seconds(rounds)
    theirs = update_seconds(reference["rounds"])
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
    }
