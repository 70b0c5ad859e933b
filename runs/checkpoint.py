"""Write, read and check checkpoints.

best_model.pt: the fields of `identity`, and `model`, `epoch`, `val_acc`, `temperature` (for calibrated probabilities).
last.pt: the fields of `identity`, and `model`, `ema` (or None), `optimizer`, `scaler` and `progress`, the fields of
`Progress`. Tensors and plain types only.
best_model.safetensors: the weights, and the rest of best_model.pt that is needed to use them, as text (`metadata`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from pretrained.files import METADATA, load_file
from runs.writing import replace_file
from system.files import json_text
from utils import UserError, log, printable, typed

if TYPE_CHECKING:
    from images.subsets import DataSet
    from transforms import Preprocess

FORMAT = 2  # of a checkpoint; others are refused

# Sums over one epoch. `images` and `correct` include every update; `loss`, `norm` and `counted` leave out skipped ones.
NO_SUMS = {"images": 0, "correct": 0.0, "loss": 0.0, "norm": 0.0, "updates": 0, "counted": 0}


@dataclass
class Progress:
    """The position of a run: everything besides the tensors that is needed to continue exactly."""

    epoch: int = 0  # epochs finished
    update: int = 0  # updates finished in the next one
    sums: dict[str, float] = field(default_factory=lambda: dict(NO_SUMS))
    skips: list[dict[str, Any]] = field(default_factory=list)
    epoch_seconds: float = 0.0
    epoch_waited: float = 0.0
    best_epoch: int = 0
    best_val_acc: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    learning_rate: float = 0.0  # of the last update
    elapsed: float = 0.0
    # Peak memory in MB for each image size and number of trained tensors; epochs that warmed up are kept apart.
    peaks: dict[tuple[int, int, bool], float] = field(default_factory=dict)
    # The same, less the memory that stood before the first update.
    training_peaks: dict[tuple[int, int, bool], float] = field(default_factory=dict)

    @property
    def peak_memory_mb(self) -> float:
        """Return the largest peak of an epoch that counts."""
        return self._largest(self.peaks)

    @property
    def training_memory_mb(self) -> float | None:
        """Return the memory of the training itself: the peak less the memory before the first update; None: unknown."""
        return self._largest(self.training_peaks) or None

    @staticmethod
    def _largest(peaks: dict[tuple[int, int, bool], float]) -> float:
        """Return the largest of these peaks that counts; 0 without peaks.

        Warm-up takes extra memory once, such as cuDNN's searches. A warm-up epoch counts only if no steady one had
        images as large and trained as many layers: with growing images there may be a single epoch of full size.
        """
        steady = [kind for kind in peaks if not kind[2]]

        def counts(size: int, trained: int, warming: bool) -> bool:
            return not warming or not any(size <= other[0] and trained <= other[1] for other in steady)

        return max((peak for kind, peak in peaks.items() if counts(*kind)), default=0.0)

    def note_peak(
        self, size: int, trained: int, megabytes: float, *, warming: bool, stood: float | None = None
    ) -> None:
        """Record the peak memory of an epoch with images of `size` pixels and `trained` trained tensors.

        `stood` is the memory that this process held before its first update; None: unknown.
        """
        kind = (size, trained, warming)
        self.peaks[kind] = max(megabytes, self.peaks.get(kind, 0.0))
        if stood is not None:
            self.training_peaks[kind] = max(round(megabytes - stood, 1), self.training_peaks.get(kind, 0.0))

    @classmethod
    def restored(cls, stored: dict[str, Any]) -> Progress:
        """Restore from a checkpoint. Raise TypeError or ValueError if fields are unknown or missing."""
        stored = {"training_peaks": {}, **stored}  # which runs of earlier versions did not note
        found = cls(**stored)
        if len(stored) < len(vars(found)):
            raise ValueError("the progress is incomplete")
        return found

    def close_epoch(self, line: dict[str, Any]) -> None:
        """Add an epoch's metrics to the history and reset the sums for the next epoch."""
        self.history.append(line)
        self.epoch += 1
        self.update = 0
        self.sums = dict(NO_SUMS)
        self.skips = []
        self.epoch_seconds = 0.0
        self.epoch_waited = 0.0


def identity(
    data: DataSet,
    *,
    model_name: str,
    model_options: dict[str, Any],
    preprocess: Preprocess,
    normalize: str,
    precision: str,
    float32_layers: str | None = None,
) -> dict[str, Any]:
    """Return the description that every checkpoint contains, enough to use it without its run's folder.

    `model_options` are the arguments of the model's constructor except the number of classes. `windows` gives, for a
    mode of deep grey images, the values shown as black and white.
    """
    return {
        "format": FORMAT,
        "classes": data.classes,
        "model_name": model_name,
        "model_options": model_options,
        "image_size": preprocess.image_size,
        "normalize": normalize,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "precision": precision,
        "fingerprint": data.fingerprint,
        "windows": {mode: list(window) for mode, window in data.rules.windows.items()},
        "resize": data.rules.resize,
        "float32_layers": float32_layers,
    }


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state. Moments get the memory format of their weights, because fused kernels walk memory."""
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)


def write_checkpoints(files: dict[Path, dict[str, Any]]) -> None:
    """Replace checkpoint files (path to content) atomically, in this order."""
    for path, content in files.items():
        size = sum(leaf.nbytes for leaf in tree_leaves(content) if torch.is_tensor(leaf))
        replace_file(path, size, partial(torch.save, content))


def snapshot(content: dict[str, Any]) -> dict[str, Any]:
    """Return a copy on the CPU that later updates do not change; tensors that share memory are copied separately."""
    copied = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
    for name in ("model", "ema"):
        if content.get(name) is not None:  # versions of layers, needed by MNASNet's loader
            copied[name]._metadata = content[name]._metadata
    return copied


_PARTS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: value == FORMAT,
    "model": lambda value: _are_weights(value),
    "ema": lambda value: value is None or _are_weights(value),  # absent from best_model.pt
    "classes": lambda value: (
        isinstance(value, list) and len(value) > 1 and all(isinstance(word, str) for word in value)
    ),
    "model_name": lambda value: isinstance(value, str),
    "image_size": lambda value: isinstance(value, int) and value > 0,
    "normalize": lambda value: value in ("imagenet", "none"),
    "windows": lambda value: (
        isinstance(value, dict) and all(_are_numbers(pair, 2) and pair[0] <= pair[1] for pair in value.values())
    ),
    "model_options": lambda value: isinstance(value, dict) and all(map(_is_plain, [*value, *value.values()])),
    "mean": lambda value: _are_numbers(value),
    "std": lambda value: _are_numbers(value) and min(value) > 0,
    "interpolation": lambda value: value in ("bilinear", "bicubic"),
    # Older checkpoints do not say the next two.
    "resize": lambda value: value in (None, "squash", "crop", "pad"),
    "float32_layers": lambda value: value is None or isinstance(value, str),
    "epoch": lambda value: value is None or isinstance(value, int),  # last.pt keeps it in `progress`
    "val_acc": lambda value: value is None or isinstance(value, (int, float)),
    "temperature": lambda value: value is None or (isinstance(value, float) and value > 0),  # older ones have none
}


def _are_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and torch.is_tensor(weight) for name, weight in value.items()
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (
        isinstance(value, (list, tuple)) and _are_numbers(value, None)
    )


def _are_numbers(values: Any, count: int | None = 3) -> bool:
    right = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
    return right and count in (None, len(values))


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Return a checkpoint that this program wrote. Raise UserError if it is missing, damaged or another program's."""
    content = load_file(file)
    if isinstance(content, dict) and METADATA in content:
        content = _from_metadata(content["state_dict"], content[METADATA], file)
    if isinstance(content, dict) and "classes" in content and content.get("format") in range(1, FORMAT):
        raise UserError(
            f"{printable(file)} was written by an earlier version of this program. Its weights can still be used: "
            f"{typed('--pretrained_path', file)}"
        )
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not all(fits(content.get(name)) for name, fits in _PARTS.items())
    ):
        raise UserError(f"{printable(file)} is not a checkpoint of this program, or is damaged.")
    _refuse_not_finite(content, file)
    return content


def _refuse_not_finite(content: dict[str, Any], file: Path) -> None:
    """Raise UserError if weights or buffers, including those of the EMA, are not finite."""
    averaged = content.get("ema")
    weights = {**content["model"], **{f"{name} (averaged)": value for name, value in (averaged or {}).items()}}
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if not bad:
        return
    if all("running_" in name for name in bad):
        best = file.with_name("best_model.pt")
        other = str(best) if best.exists() and best.name != file.name else "FILE"
        raise UserError(
            f"{printable(file)} holds running statistics that are not finite, such as {bad[0]}: a forward pass "
            "overflowed into them, and no precision mends them.\nUse another checkpoint. To train on from its weights, "
            f"begin another run: {typed('--pretrained_path', other)} --checkpoint_name NAME"
        )
    raise UserError(
        f"{printable(file)} holds weights that are not finite, such as {bad[0]}: its run diverged, or it is damaged."
    )


_AS_TEXT = ("classes", "image_size", "mean", "std", "model_options", "windows", "epoch", "val_acc")
_IF_GIVEN = ("float32_layers", "resize", "temperature")


def metadata(checkpoint: dict[str, Any]) -> dict[str, str]:
    """Return the facts needed to use a checkpoint's weights as text: safetensors and ONNX files hold only text."""
    plain = {name: checkpoint[name] for name in ("normalize", "interpolation")}
    return {
        "model": checkpoint["model_name"],
        **plain,
        **{name: json_text(checkpoint[name]) for name in _AS_TEXT if name in checkpoint},
        **{name: json_text(checkpoint[name]) for name in _IF_GIVEN if checkpoint.get(name)},
    }


def _from_metadata(weights: Any, facts: dict[str, str], file: Path) -> dict[str, Any] | None:
    """Return the checkpoint that `metadata` describes, or None if its text is damaged. Raise UserError for a lack."""
    missing = [name for name in ("model", "normalize", "interpolation", *_AS_TEXT) if name not in facts]
    if missing:
        raise UserError(
            f"{printable(file)} does not say {missing[0]}: use the best_model.pt that it was made from, or write it "
            "again with export --safetensors."
        )
    try:
        told = {name: json.loads(facts[name]) for name in (*_AS_TEXT, *_IF_GIVEN) if name in facts}
    except (ValueError, RecursionError):
        return None
    plain = {name: facts[name] for name in ("normalize", "interpolation")}
    return {"format": FORMAT, "model": weights, "model_name": facts["model"], **plain, **told}


def as_tested(content: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint as it is used: for last.pt, the EMA weights if there are any, its epoch and its accuracy."""
    if "progress" not in content:
        return content
    progress = content["progress"]
    last = progress["history"][-1] if progress["history"] else {}
    if content["ema"] is not None:
        log.info("last.pt: its averaged weights (EMA) are used, as they were validated")
    weights = content["model"] if content["ema"] is None else content["ema"]
    return {**content, "model": weights, "epoch": progress["epoch"], "val_acc": last.get("val_acc")}
