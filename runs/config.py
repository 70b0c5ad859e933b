"""Write and read config.json, which is enough to repeat a run: options, versions, device and data. Imports no torch."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from system.files import read_json, reading
from system.machine import device_name
from utils import printable

if TYPE_CHECKING:
    from assemble import Setup
    from images.subsets import DataSet

NOT_RECORDED = ("command", "evaluate", "recorded", "recorded_on")  # of the Namespace


def read_config(file: Path) -> dict[str, Any]:
    """Return a run's config.json. Raise UserError if it is missing or damaged."""
    config = read_json(file)
    with reading(file):
        parts = config["options"], config.setdefault("versions", {}), config.setdefault("dataset", {})
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("a table was expected")
    return config


def versions(model_name: str) -> dict[str, str]:
    """Return the version of each package that a model depends on: another timm may build another network."""
    import numpy
    import PIL
    import torch
    import torchvision

    from option import VERSION

    return {
        "amp-train": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "scikit-learn": version("scikit-learn"),
        **({"timm": version("timm")} if model_name.lower().startswith("timm:") else {}),
    }


def record(setup: Setup, data: DataSet, *, model_options: dict[str, Any], settled: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json: every option, versions, device and data.

    `settled` are the values of options that were left open, such as a batch size that was chosen.
    """
    import torch

    options = {name: value for name, value in setup.asked.given.flat.items() if name not in NOT_RECORDED} | settled
    return {
        "options": options,
        "versions": versions(options["model"]),
        "model_options": model_options,
        "device": setup.device.type,
        "device_name": device_name(setup.device),
        "threads": torch.get_num_threads(),
        "ranks": setup.ranks.size,
        "precision": setup.precision.name,
        "precision_reason": setup.precision.reason,
        "dataset": describe(data),
    }


_COUNTED = {"train": "train", "validation": "val", "test": "test"}  # subsets of a data set, as config.json calls them


def describe(data: DataSet) -> dict[str, Any]:
    """Return the description of a data set that config.json records."""
    from images.subsets import files_checksum

    return {
        "fingerprint": data.fingerprint,
        "folder": str(data.root.resolve()),
        "classes": data.classes,
        **{short: len(data.subsets[name]) for name, short in _COUNTED.items() if name in data.subsets},
        "tested": files_checksum(data.test.paths, data.root),
        "unreadable": data.unreadable,
        "windows": data.rules.windows,
        "resize": data.rules.resize,
    }


def known_runs(folder: str | Path, file: str) -> str:
    """Return a sentence that names the runs in `folder` that have `file`, for errors about a run that is missing."""
    runs = sorted(path.parent.name for path in Path(folder).glob(f"*/{file}"))
    if not runs:
        return f"No run with a {file} is in {printable(Path(folder).absolute())}."
    return f"Name a run with --checkpoint_name. Runs there: {', '.join(map(printable, runs))}."
