"""Sets of defaults: those of --demo, of --preset and of single commands. Imports no torch."""

from __future__ import annotations

from typing import Any

from command_line.kinds import ALL

# Defaults of --demo: two CPU cores learn this problem from scratch in well under a minute.
DEMO = {
    "data_dir": "data/demo",
    "pretrained": 0,
    "image_size": 64,
    "batch_size": 64,
    "epochs": 8,
    "learning_rate": 2e-3,
    "log_interval": 5,
}

# Further defaults of --demo on a CUDA device, and the scenes that it draws there: 300 updates of 4 GB in FP32.
DEMO_ON_CUDA = {"data_dir": "data/demo_cuda", "image_size": 224, "batch_size": 128, "epochs": 8}
SCENES_ON_CUDA = {"train_images": 6000, "test_images": 1500, "size": 224}

# Defaults of --preset. They replace the defaults of the 2020 tutorial; those of --demo replace both.
PRESETS: dict[str, dict[str, Any]] = {
    "tutorial": {},
    "finetune": {
        "optimizer": "ADAMW",
        "learning_rate": 1e-3,
        "backbone_lr": 0.3,
        "weight_decay": 0.02,
        "decay_norms": False,
        "batch_size": 64,
        "epochs": 8,
        "augment": "crop",
        "label_smoothing": 0.1,
        "ema": 0.99,
        "tta": "flip",
        "split": "77,8,15",  # if there is a test folder, a tenth is held out; the tutorial holds out a fifth
    },
    "scratch": {
        "pretrained": 0,
        "image_size": 128,
        "start_size": 48,
        "optimizer": "ADAMW",
        "learning_rate": 2e-3,
        "decay_type": "linear_warmup",
        "weight_decay": 0.05,
        "decay_norms": False,
        "batch_size": 64,
        "epochs": 28,
        "augment": "crop",
        "label_smoothing": 0.1,
        "ema": 0.995,
        "tta": "flip",
        "split": "77,8,15",
    },
    "probe": {
        "freeze_epochs": ALL,
        "image_size": 224,  # at which most networks were trained: a frozen one knows no other
        "optimizer": "ADAMW",
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "batch_size": 256,
        "epochs": 40,
        "tta": "flip",
    },
}

# A command's own defaults, and options that it does not offer but that its data or model reads. Commands on a finished
# run also use its recorded options; None: the value in its checkpoint.
_READING = dict.fromkeys(("image_size", "resize", "normalize", "window"))
_AS_TRAINED = {**_READING, "augment": "flip", "num_classes": None}
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "evaluate": _AS_TRAINED,
    "predict": _AS_TRAINED,
    "inspect": {
        "pretrained": 0,
        "image_size": None,
        "normalize": None,
        "amp": False,
        "channels_last": True,
        "accumulate": 1,
        "augment": "flip",
        "mixup": 0.0,
        "cutmix": 0.0,
        "sampler": "shuffle",
        "start_size": 0,
        "epochs": 1,
    },
    "export": {**_AS_TRAINED, "device": "cpu", "amp": False, "channels_last": True},
}
