"""The tables behind `--best_by`, `--optimizer`, `--decay_type`, `--augment`, `--tta`: to add one, add an entry here.

Options, training, tables, JSON and pages take names, functions and titles from these entries. Imports no torch, so that
`--help` answers at once: a class of PyTorch is named, and looked up when it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runs.evaluation import Evaluation


@dataclass(frozen=True)
class Metric:
    """One figure of an `Evaluation`: in metrics.jsonl as `val_KEY`, in result.json as `test_KEY` or `result_key`.

    It is NaN if it is undefined, as described by `needs`.
    """

    compute: Callable[[Evaluation], float]
    key: str
    larger_is_better: bool = True
    result_key: str = ""  # if it is not test_KEY
    title: str = ""  # of its row among the headline numbers of a result; empty: it has no row
    remark: str = ""  # beside it
    unit: str = " %"
    needs: str = ""  # if set, only the test has the figure, and the validation if --best_by names it

    @property
    def validation_key(self) -> str:
        """Return the name of the figure in a line of metrics.jsonl."""
        return f"val_{self.key}"

    @property
    def test_key(self) -> str:
        """Return the name of the figure in result.json."""
        return self.result_key or f"test_{self.key}"


METRICS = {
    "accuracy": Metric(lambda found: found.accuracy, "acc", title="Test accuracy"),
    "balanced_accuracy": Metric(
        lambda found: 100 * found.macro()["recall"],
        "balanced_acc",
        result_key="balanced_acc",
        title="Balanced",
        remark="mean recall of the classes",
    ),
    "macro_f1": Metric(
        lambda found: 100 * found.macro()["f1"],
        "macro_f1",
        result_key="macro_f1",
        title="Macro F1",
        remark="mean F1 of the classes",
    ),
    "loss": Metric(lambda found: found.loss, "loss", larger_is_better=False, unit=" nats"),
    "specificity": Metric(
        lambda found: 100 * found.macro()["specificity"],
        "specificity",
        result_key="specificity",
        needs="images of two classes",
    ),
    "roc_auc": Metric(
        lambda found: 100 * found.macro().get("roc_auc", math.nan),
        "roc_auc",
        result_key="roc_auc",
        title="ROC AUC",
        remark="mean of the classes, each against the rest",
        needs="images of two classes, and at most 1,000 classes",
    ),
    "average_precision": Metric(
        lambda found: 100 * found.macro().get("average_precision", math.nan),
        "average_precision",
        result_key="average_precision",
        title="Mean AP",
        remark="mean average precision of the classes",
        needs="images of two classes, and at most 1,000 classes",
    ),
    "top5": Metric(
        lambda found: found.top(5),
        "top5_acc",
        result_key="top5_acc",
        title="Top 5",
        remark="the true class is among the five likeliest",
        needs="6 to 1,000 classes",
    ),
}


@dataclass(frozen=True)
class OptimizerRule:
    """One class of torch.optim and the arguments that it gets beside learning rate and weight decay."""

    class_name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    zero_state: tuple[str, ...] = ()  # of each parameter, made before the first update


OPTIMIZERS = {
    "ADAM": OptimizerRule("Adam"),  # betas 0.9 and 0.999, eps 1e-8
    "SGD": OptimizerRule("SGD", {"momentum": 0.9}, ("momentum_buffer",)),  # fused SGD cannot make it later for some
    "ADAMW": OptimizerRule("AdamW"),
}


@dataclass(frozen=True)
class Schedule:
    """The learning rate after warmup, as a factor of its peak, and the default length of the warmup.

    `factor(step, length, updates_per_epoch)` counts updates: `step` from 0 at the first update after warmup, `length`
    from there to the end of the training.
    """

    factor: Callable[[int, int, int], float]
    warms_up: bool = True
    warmup_epochs: float | None = None  # by default a tenth of all epochs


def cosine(step: int, length: int, _updates_per_epoch: int) -> float:
    """Return half a cosine (Loshchilov and Hutter 2017). Warmup ends on the peak, so that step 0 is below it."""
    return 0.5 * (1 + math.cos(math.pi * (step + 1) / (length + 1)))


def linear(step: int, length: int, _updates_per_epoch: int) -> float:
    """Return a straight line to just above 0 (Defazio et al. 2023)."""
    return 1 - (step + 1) / (length + 1)


def stairs(step: int, _length: int, updates_per_epoch: int) -> float:
    """Divide by 10 at epochs 30, 60 and 90 after warmup."""
    passed = [milestone for milestone in (30, 60, 90) if step >= milestone * updates_per_epoch]
    return 0.1 ** len(passed)


SCHEDULES = {
    "cosine_warmup": Schedule(cosine),
    "linear_warmup": Schedule(linear),
    "step": Schedule(stairs, warms_up=False),
    "step_warmup": Schedule(stairs, warmup_epochs=5),
}


# When an augmentation changes images: as uint8 before they are resized, in the resizing, or as float32 between 0 and 1
# after it, or once they are normalised.
BEFORE_RESIZING = "before resizing"
RESIZING = "resizing"
RESIZED = "resized"
NORMALIZED = "normalised"


@dataclass(frozen=True)
class Augmentation:
    """One name of `--augment`: when it acts and, if torchvision has it, its class in torchvision.transforms.v2.

    Those without a class are written in transforms.py.
    """

    stage: str = RESIZING
    class_name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(),
    "upright": Augmentation(),
    "vertical": Augmentation(),
    "turns": Augmentation(),
    "crop": Augmentation(),
    "trivial": Augmentation(BEFORE_RESIZING, "TrivialAugmentWide"),
    "randaugment": Augmentation(BEFORE_RESIZING, "RandAugment"),
    "augmix": Augmentation(BEFORE_RESIZING, "AugMix"),
    "jitter": Augmentation(RESIZED, "ColorJitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}),
    "erasing": Augmentation(NORMALIZED, "RandomErasing", {"p": 0.25}),
}


@dataclass(frozen=True)
class Views:
    """One name of `--tta`: turns of each image and of its mirror image, whose logits are averaged."""

    title: str = ""  # of its row among the headline numbers of a result
    remark: str = ""  # beside it
    quarters: tuple[int, ...] = (0,)


VIEWS = {
    "none": Views(),
    "flip": Views("Test-time flip", "mean logits of each image and its mirror image"),
    "eight": Views("Eight views", "mean logits of quarter turns and mirror images", (0, 1, 2, 3)),
}
