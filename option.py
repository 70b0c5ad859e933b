"""Every option of every command: declared once, with its kind, default, help and role. Imports no torch.

command_line/kinds.py defines the values that an option accepts, command_line/helping.py shows options, and
command_line/parsing.py reads them.
"""

from __future__ import annotations

import argparse

from choices import METRICS, OPTIMIZERS, SCHEDULES, VIEWS
from command_line.kinds import (
    ALPHA,
    AUGMENT,
    CALL,
    COUNT,
    COUNT_OR_AUTO,
    DIR,
    EPOCHS,
    EVERY,
    FACTOR,
    FILE,
    FILES,
    FLAG,
    HANDLING,
    LIST,
    LOG,
    NAME,
    ONE_FILE,
    PIXELS,
    PLACE,
    POSITIVE,
    PRECISION,
    RATE,
    REPEAT,
    SEED,
    SHARE,
    START,
    START_PIXELS,
    SWITCH,
    TIME,
    Option,
    key_of,
    one_of,
    path,
    pretrained,
    split,
    whole,
    window,
)
from command_line.presets import PRESETS
from precision_table import PRECISIONS

VERSION = "0.1.0"
COMMANDS = {
    "train": "train a classifier and test its best epoch (the default command)",
    "evaluate": "test the best checkpoint of a named run, with the options that it was trained with",
    "predict": "classify image files and folders with a trained run",
    "compare": "train once per precision and tabulate accuracy, memory and time",
    "audit": "find images whose labels are probably wrong, by models trained on folds of the data",
    "report": "draw the pictures and the page of a finished run again, from its files",
    "doctor": "say what this machine can do, and what to expect of AMP on it",
    "inspect": "show what AMP does to a model, also to yours: types, memory, ranges, faults, gain",
    "prepare": "put a data set on disk (download, archive or demo scenes), or report on one",
    "export": "write a trained run as ONNX",
}

OPEN = Option(FLAG, False, "open the page in the browser", CALL)
DEVICE = Option(NAME, "auto", "device to compute on: auto, cpu, cuda, cuda:1, mps", PLACE)
TTA = Option(
    key_of(VIEWS),
    "none",
    "average the logits of views of each test image; flip: it and its mirror image; eight: quarter turns of both",
)
MODEL = Option(NAME, "ResNet18", "a classification model of torchvision, or of timm as timm:NAME")
LABELS = Option(
    FILE,
    None,
    "table of labels: a column of paths or ids, one of labels or one a class; FILE:path,label names the columns",
    PLACE,
)
MEGAPIXELS = Option({**POSITIVE, "metavar": "N"}, 179.0, "refuse images of more megapixels than this", START)
WINDOW = Option(
    {"metavar": "LOW,HIGH", "type": window},
    "data",
    "values that become black and white in 16-bit, integer and float pictures; data: the range of the training "
    "images; type: 0 to 65535, or 0 to 1",
)
OPTIONS = {
    "run": {
        "checkpoint_dir": Option(DIR, "checkpoint", "folder that holds all runs", CALL),
        "checkpoint_name": Option(NAME, "", "this run's folder in it (default: model and precision)", CALL),
        "seed": Option(SEED, 42, "seed of the split, the order of images, augmentation and initial weights", REPEAT),
        "config": Option(FILE, None, "take options from a run's config.json; the command line wins", CALL),
        "quiet": Option(FLAG, False, "print results and warnings only, without progress bars", CALL),
    },
    "data": {
        "data_dir": Option(DIR, "data", "folder that holds the images", PLACE),
        "demo": Option(FLAG, False, "use drawn scenes, and defaults that fit them", CALL),
        "image_size": Option(PIXELS, 256, "side of the square images that the model sees"),
        "resize": Option(
            one_of("squash", "crop", "pad"), "squash", "squash images into the square, crop to it, or pad with black"
        ),
        "start_size": Option(
            START_PIXELS, 0, "side of the first images, which grow to --image_size for the last tenth of epochs; 0: off"
        ),
        "normalize": Option(
            one_of("imagenet", "none"),
            "imagenet",
            "imagenet: subtract the mean and divide by the standard deviation of the model's ImageNet weights; none: "
            "values from 0 to 1",
        ),
        "cache": Option(
            one_of("auto", "memory", "none"),
            "auto",
            "memory: keep images decoded; none: decode them in every epoch; auto: keep them if they fit",
            HANDLING,
        ),
        "num_workers": Option(
            whole(0, 1024), None, "decoding threads or processes (default: one per core, at most 8)", HANDLING
        ),
        "skip_unreadable": Option(FLAG, False, "leave out images that cannot be read", START),
        "labels": LABELS,
        "group": Option(
            {"metavar": "PATTERN"},
            None,
            "keep images of one group on one side of the split: a column of --labels, or a regular expression to "
            "find the group in each path",
        ),
        "split": Option(
            {"metavar": "SHARES", "type": split},
            None,
            "percentages of training, validation and test, or a split.csv (default: 70,15,15; 80,20 if there is a "
            "test folder)",
        ),
        "window": WINDOW,
        "max_megapixels": MEGAPIXELS,
        "cache_limit": Option(
            {**POSITIVE, "metavar": "GB"},
            100.0,
            "limit the cache of decoded images to this size; the least recently used are deleted",
            HANDLING,
        ),
    },
    "model": {
        "model": MODEL,
        "num_classes": Option(whole(2), None, "number of classes (default: counted from the folders)"),
        "pretrained": Option(one_of(1, 0, type=pretrained), 1, "1: start from ImageNet weights; 0: from random", START),
        "weights": Option(NAME, None, "set of torchvision's ImageNet weights (default: DEFAULT, its best)", START),
        "pretrained_path": Option(FILE, None, "file of weights to start from (PyTorch, timm, safetensors ...)", START),
    },
    "device and precision": {
        "device": DEVICE,
        "amp": Option(SWITCH, False, "use automatic mixed precision", PRECISION),
        "amp_dtype": Option(
            one_of("auto", "float16", "bfloat16"),
            "auto",
            "16-bit type of --amp; auto: float16 on CUDA, bfloat16 elsewhere",
            PRECISION,
        ),
        "float32_layers": Option(
            {"metavar": "PATTERN"},
            None,
            "layers that compute in float32 with --amp: names or shell patterns of modules, separated by commas, such "
            "as fc,layer4.* (a finished run: as it was trained; compare: one row with them and one without)",
            PRECISION,
        ),
        "tf32": Option(SWITCH, False, "without --amp, let CUDA round the factors of products to TF32", PRECISION),
        "channels_last": Option(SWITCH, True, "store images and convolutions with channels last, which is faster"),
        "compile": Option(SWITCH, False, "compile the model with torch.compile; doctor --ladder says if it pays"),
        "cuda_graphs": Option(SWITCH, False, "compile the model and replay its kernels as CUDA graphs"),
    },
    "training": {
        "preset": Option(
            one_of(*PRESETS),
            "tutorial",
            "set of options; those typed win. tutorial: the defaults; finetune: pretrained weights, in little time; "
            "scratch: random weights, small images first; probe: only a new head, for machines without a GPU",
            START,
        ),
        "batch_size": Option(
            COUNT_OR_AUTO,
            256,
            "number of images in one update; auto: the default, split into micro-batches that fit into memory",
        ),
        "accumulate": Option(COUNT, 1, "split a batch into N micro-batches to save memory (BatchNorm sees each alone)"),
        "epochs": Option(COUNT, 120, "number of passes over the training images"),
        "fraction": Option(FACTOR, 1.0, "share of the training images of each class to train on"),
        "optimizer": Option(key_of(OPTIMIZERS, type=str.upper), "ADAM", "optimizer that updates weights"),
        "learning_rate": Option(POSITIVE, 1e-4, "peak learning rate"),
        "weight_decay": Option(RATE, 1e-4, "weight of the L2 penalty; with ADAMW it is decoupled from the gradient"),
        "decay_norms": Option(SWITCH, True, "also apply the weight decay to norms and biases"),
        "backbone_lr": Option(RATE, 1.0, "learning rate of all layers but the head, as a factor of --learning_rate"),
        "layer_decay": Option(
            FACTOR, 1.0, "factor of the learning rate for each transformer block between a layer and the head"
        ),
        "decay_type": Option(
            key_of(SCHEDULES), "cosine_warmup", "learning rate schedule; step: divide by 10 at epochs 30, 60 and 90"
        ),
        "warmup_epochs": Option(
            {**RATE, "metavar": "N"}, None, "epochs of warmup (default: 5 for step_warmup, else epochs/10)"
        ),
        "class_weights": Option(
            one_of("none", "balanced"),
            "none",
            "balanced: weight the loss of an image by the inverse of its class's frequency",
        ),
        "sampler": Option(
            one_of("shuffle", "balanced"),
            "shuffle",
            "shuffle: each image once in an epoch; balanced: images of each class equally often",
        ),
        "best_by": Option(
            key_of(METRICS),
            "accuracy",
            "validation figure that chooses the best epoch, also for --patience; of equal ones the lower loss",
        ),
        "clip_grad_norm": Option(POSITIVE, None, "clip the gradients' global L2 norm to this value"),
        "label_smoothing": Option(SHARE, 0.0, "share of each label that is spread over all classes"),
        "augment": Option(
            AUGMENT,
            "flip",
            "list of flip (mirror half of the images), vertical (top to bottom), turns (by quarters), crop, trivial "
            "(TrivialAugment), randaugment, augmix, jitter, erasing, upright; every list mirrors images unless it "
            "holds upright; none: leave them as they are",
        ),
        "mixup": Option(ALPHA, 0.0, "blend pairs of images with a weight from Beta(ALPHA, ALPHA); 0: off"),
        "cutmix": Option(ALPHA, 0.0, "paste patches between images, of a share from Beta(ALPHA, ALPHA); 0: off"),
        "ema": Option(SHARE, 0.0, "test an exponential moving average of the weights with this decay; 0: off"),
        "freeze_epochs": Option(
            EPOCHS, 0, "train only the new head for the first N epochs; all: for all, on outputs computed once"
        ),
        "patience": Option(
            COUNT,
            None,
            "stop after N epochs without improvement (epochs with frozen layers or small images do not count)",
        ),
        "tta": TTA,
        "checkpoint_blocks": Option(FLAG, False, "save memory: compute each block again in the backward pass"),
        "sync_batchnorm": Option(FLAG, False, "compute batch statistics over all processes"),
    },
    "recording and resuming": {
        "log_interval": Option(COUNT, 20, "number of updates between two readings of loss and accuracy", HANDLING),
        "watch": Option(COUNT, None, "write the largest values of each layer every N updates", HANDLING),
        "resume": Option(
            one_of("yes", "auto", nargs="?", const="yes", metavar="auto"),
            None,
            "continue from last.pt; auto: start a new run if there is none",
            CALL,
        ),
        "overwrite": Option(FLAG, False, "replace a finished run of the same name", CALL),
        "max_time": Option(TIME, None, "stop and save before this process has taken so long", CALL),
        "checkpoint_every": Option(EVERY, None, "also save within epochs, every N minutes or updates", HANDLING),
        "log": Option(LOG, None, "also log to these: tensorboard, wandb, mlflow, separated by commas", HANDLING),
        "tensorboard": Option(FLAG, False, "the same as --log tensorboard", HANDLING),
        "safetensors": Option(FLAG, False, "also write the best weights as best_model.safetensors", HANDLING),
    },
    "time": {
        "budget": Option(
            TIME, None, "choose --epochs so that the training ends after this time, by its first updates' speed", CALL
        )
    },
    "testing": {"evaluate": Option(FLAG, False, "do what the command evaluate does", CALL)},
    "a finished run": {
        "tta": TTA,
        "batch_size": Option(COUNT, 256, "number of images computed at a time; on a CPU never more than 32"),
        "checkpoint": Option(
            FILES,
            None,
            "checkpoint to use (default: best_model.pt of the run); of several, the mean of their probabilities",
            CALL,
        ),
    },
    "a finished run's folder": {
        "checkpoint_dir": Option(DIR, "checkpoint", "folder that holds all runs", CALL),
        "checkpoint_name": Option(NAME, "", "the run's folder in it", CALL),
        "open": OPEN,
        "quiet": Option(FLAG, False, "print results and warnings only, without progress bars", CALL),
    },
    "evaluation": {
        "evaluate": Option(FLAG, False, argparse.SUPPRESS, CALL),
        "precisions": Option(LIST, None, "test in each of these, e.g. fp32,amp-bf16, and report what changes", CALL),
    },
    "new data": {
        "out": Option(DIR, None, "write predictions, pictures, a page and result.json into this folder", CALL),
        "csv": Option(FILE, None, "write every prediction as CSV", CALL),
        "json": Option(FILE, None, "write the result as JSON", CALL),
    },
    "prediction": {
        "inputs": Option(
            {"metavar": "PATH", "nargs": "+", "type": path},
            None,
            "image files, folders, @LIST of paths, or - for stdin",
            CALL,
        ),
        "top_k": Option(COUNT, 3, "number of classes shown for each image"),
        "min_confidence": Option(
            SHARE,
            None,
            "answer `none of these` if no class is as probable as this; evaluate says how many that refuses",
            CALL,
        ),
        "csv": Option(FILE, None, "write every prediction as CSV", CALL),
        "json": Option(FILE, None, "write every prediction as JSON", CALL),
        "submission": Option(
            FILE,
            None,
            "write --csv (default: submission.csv) with ids, order and columns of this sample_submission.csv",
            CALL,
        ),
        "embed": Option(
            FILE, None, "write what the head gets of each image, beside class and probability, as .npz or .csv", CALL
        ),
        "contact_sheet": Option(FILE, None, "write a PNG of the images with their predictions", CALL),
        "explain": Option(FILE, None, "write a PNG of the parts of images that decide their class (Grad-CAM)", CALL),
    },
    "comparison": {
        "precisions": Option(
            LIST,
            None,
            f"precisions to train in, out of {','.join(PRECISIONS)} (default: all on Ampere GPUs and later, "
            "fp32 and amp-fp16 on older ones, fp32 and amp-bf16 elsewhere)",
            CALL,
        ),
        "seeds": Option(COUNT, 1, "number of runs per precision, each with another seed", CALL),
        "ladder": Option(FLAG, False, argparse.SUPPRESS, CALL),
        "report_only": Option(FLAG, False, "draw table and picture again from finished runs", CALL),
        "runs": Option({**DIR, "nargs": "+"}, None, "report on these run folders instead", CALL),
        "open": OPEN,
    },
    "examination": {
        "device": DEVICE,
        "model": MODEL,
        "image_size": Option(PIXELS, None, "side of the square images (default: 256 on a GPU, 128 on a CPU)"),
        "batch_size": Option(COUNT, None, "number of images in one update (default: what fits on a GPU, 32 on a CPU)"),
        "data_dir": Option(DIR, None, "also measure how fast this data set can be loaded", PLACE),
        "json": Option(FILE, None, "write all findings as JSON", CALL),
        "ladder": Option(FLAG, False, "time each step from the 2020 loop to this package's, and its bound", CALL),
        "out": Option(DIR, "ladder", "folder for the table and the picture of --ladder", CALL),
    },
    "inspection": {
        "device": DEVICE,
        "batch_size": Option(COUNT, 32, "number of images in the batch"),
        "precisions": Option(LIST, None, "precisions to inspect (default: those that suit the device)", CALL),
        "full": Option(FLAG, False, "list every operator", CALL),
        "checkpoint": Option(ONE_FILE, None, "inspect the weights of this checkpoint", CALL),
        "module": Option(NAME, None, "inspect your own model: FILE.py:make returns (model, batch, loss)", CALL),
        "script": Option(FILE, None, "trace an update of your own training script; its arguments stand after --", CALL),
        "inputs": Option({"metavar": "ARGUMENT", "nargs": "*"}, None, "arguments of the script", CALL),
        "diary": Option(FILE, None, "draw the loss scale from this diary, which ampscope.watch wrote", CALL),
        "out": Option(DIR, "inspect", "folder for JSON, pictures and the page", CALL),
        "strict": Option(FLAG, False, "end with status 1 if a rule is broken", CALL),
        "open": OPEN,
        "layers": Option(FLAG, False, "show the error of each layer in 16 bits in place of the report", CALL),
        "find_layers": Option(FLAG, False, "also search for the layers to keep in float32", CALL),
    },
    "one of these": {
        "download": Option(FLAG, False, "download Intel Image Classification from Kaggle", CALL),
        "archive": Option(FILE, None, "unpack this .zip", CALL),
        "demo": Option(FLAG, False, "draw scenes of six classes", CALL),
        "check": Option(FLAG, False, "report on the data set that is there", CALL),
        "clean": Option(FLAG, False, "list and remove the decoded images that are kept for the data set", CALL),
    },
    "preparation": {
        "data_dir": Option(DIR, "data", "folder to put the data set into", PLACE),
        "archive_encoding": Option(NAME, None, "code page of the names in --archive, e.g. cp932", CALL),
        "train_images": Option(whole(60, 10**6), 1200, "number of demo scenes for training"),
        "test_images": Option(whole(12, 10**6), 300, "number of demo scenes for testing"),
        "seed": Option(SEED, 0, "seed of the drawing", REPEAT),
        "labels": LABELS,
        "window": WINDOW,
        "max_megapixels": MEGAPIXELS,
        "model": Option(
            NAME,
            None,
            "with --check, also list nearly equal pictures of two parts, by this model's ImageNet weights",
            CALL,
        ),
        "pretrained_path": Option(FILE, None, "weights for that model, in place of the published ones", START),
        "json": Option(FILE, None, "write all that --check found as JSON", CALL),
    },
    "auditing": {
        "folds": Option(whole(2, 100), 5, "number of parts: each is judged by a model that was trained on the others")
    },
    "export": {
        "tta": TTA,
        "checkpoint": Option(ONE_FILE, None, "checkpoint to export (default: best_model.pt of the run)", CALL),
        "out": Option(FILE, None, "file to write (default: model.onnx in the run's folder)", CALL),
        "safetensors": Option(FLAG, False, "write the weights as best_model.safetensors instead of ONNX", CALL),
        "float16": Option(
            FLAG, False, "let the network compute in float16: half the file (default name: model_float16.onnx)", CALL
        ),
    },
}
_TRAINING = ("run", "data", "model", "device and precision", "training", "recording and resuming")
_FINISHED = ("run", "data", "device and precision", "a finished run")
GROUPS = {
    "train": (*_TRAINING, "time", "testing"),
    "evaluate": (*_FINISHED, "evaluation", "new data"),
    "predict": (*_FINISHED, "prediction"),
    "compare": (*_TRAINING, "comparison"),
    "audit": (*_TRAINING, "auditing"),
    "report": ("a finished run's folder",),
    "doctor": ("examination",),
    "inspect": ("run", "data", "model", "inspection"),
    "prepare": ("one of these", "preparation"),
    "export": ("run", "export"),
}


def options_of(command: str) -> dict[str, Option]:
    """Return a command's options by name."""
    return {name: option for group in GROUPS[command] for name, option in OPTIONS[group].items()}


def named(*roles: str) -> frozenset[str]:
    """Return the names of all options that have only these roles, in all groups that contain them."""
    table = [(name, option.role) for group in OPTIONS.values() for name, option in group.items()]
    return frozenset(name for name, role in table if role in roles) - {n for n, role in table if role not in roles}


MAY_DIFFER_ON_RESUME = named(CALL, HANDLING, PLACE, START)
MAY_DIFFER_IN_COMPARISON = named(CALL, HANDLING, PLACE, PRECISION, REPEAT)
SAME_TRAINING = named(CALL, HANDLING)  # with these a finished run is still the one that is asked for
