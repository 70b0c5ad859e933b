"""Any combination of options either trains to the end or is refused in words; hostile words never raise.

PROPERTY_EXAMPLES=500 pytest tests/long/test_properties.py tries 500 combinations instead of 30.
"""

import contextlib
import io
import json
import os
import shutil
from collections import Counter

import pytest
import tiny

import utils

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
import option
from command_line import parsing

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "30"))
QUICK = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 30,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.draw(tmp_path_factory.mktemp("data"), train=15, test=3)


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    yield
    print("\ntrainings by exit status:", dict(seen))


def run(words) -> tuple[int, str]:
    """Exit status and what went to stderr; an exception that gets out fails the test."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main.main(words)
        except SystemExit as ended:  # --help and --version
            status = ended.code
    return status, errors.getvalue()


# Values that are right alone, and some that are wrong only beside one another.
RIGHT = {
    "batch_size": (1, 2, 3, 7, 12, 100, 2**31),
    "accumulate": (1, 2, 3, 7),
    "epochs": (1, 2),
    "image_size": (16, 33, 40),
    "ema": (0, 0.5, 0.999999),
    "amp_dtype": ("auto", "bfloat16", "float16"),
    "optimizer": ("SGD", "ADAMW", "adam"),
    "learning_rate": (1e-9, 0.1, 1e30),
    "weight_decay": (0, 0.1, 1e30),
    "warmup_epochs": (0, 0.1, 1, 2),
    "decay_type": ("step", "step_warmup", "cosine_warmup", "linear_warmup"),
    "clip_grad_norm": (1e-9, 1, 1e30),
    "label_smoothing": (0, 0.1, 0.99),
    "augment": ("flip", "crop", "trivial", "none"),
    "mixup": (0, 0.2, 1, 0.001, 1000),
    "cutmix": (0, 0.2, 1, 0.001, 1000),
    "freeze_epochs": (0, 1, 2),
    "patience": (1, 5),
    "num_classes": (3, 4),
    "seed": (0, 7, 2**32, 2**63 - 1),
    "normalize": ("none", "imagenet"),
    "cache": ("none", "memory"),
    "log_interval": (1, 3, 10**9),
    "checkpoint_every": ("1u", "2u", "0.00001m", "1e9m"),
    "resume": ("auto", "yes"),
    "model": ("squeezenet1_1", "ShuffleNet_V2_x0_5", "mnasnet0_5"),
    "device": ("cpu", "auto", "cpu:0"),
    "checkpoint_name": ("a", "a/b", "a b", "$x"),
    "amp": None,
    "tf32": None,
    "overwrite": None,
    "no-channels_last": None,
    "sync_batchnorm": None,
    "skip_unreadable": None,
}
WRONG = {
    "batch_size": (0, -1, "x", ""),
    "accumulate": (0, 1.5),
    "epochs": (0, "all"),
    "image_size": (15, 5000, "large"),
    "ema": (1, -0.1, "nan"),
    "amp_dtype": ("float64",),
    "optimizer": ("LION", ""),
    "learning_rate": (0, "nan", "inf", -1),
    "weight_decay": (-1, "nan"),
    "decay_type": ("linear",),
    "warmup_epochs": (1e9, -1, "nan"),
    "clip_grad_norm": (0, "inf"),
    "label_smoothing": (1, -1),
    "augment": ("rotate",),
    "mixup": (-1, "nan", 1e-300),
    "cutmix": (-1, "inf", 1e30),
    "freeze_epochs": (-1, 9),
    "patience": (0,),
    "seed": (-1, 2**64, 1.0),
    "num_classes": (1, 7),
    "normalize": ("zca",),
    "cache": ("disk",),
    "num_workers": (2**31, -1),
    "log_interval": (0,),
    "checkpoint_every": ("infu", "nanm", "0u", "1.5u", "m", "", "u"),
    "resume": ("no",),
    "model": ("resnet999", "", "fcn_resnet50", "raft_large"),
    "device": ("meta", "cuda:99", "cuda:-1", "toaster", "", "cpu:x"),
    "pretrained": (2,),
    "checkpoint_name": ("..", "/absolute", "x" * 300, "new\nline", "\ud800", "a/../../b"),
    "pretrained_path": ("/nonexistent", "/", "/dev/null"),
    "config": ("/nonexistent", "/dev/null", "/"),
    "data_dir": ("/nonexistent", "/dev/null", ""),
    "unknown": (1,),
}


def spelled(name: str, values: tuple | None) -> list[list[str]]:
    return [[f"--{name}"]] if values is None else [[f"--{name}={value}"] for value in values]


some = st.lists(st.sampled_from(sorted(RIGHT)), max_size=8, unique=True)
combinations = some.flatmap(
    lambda names: st.tuples(*(st.sampled_from(spelled(name, RIGHT[name])) for name in names))
).map(lambda parts: [word for part in parts for word in part])
one_wrong = st.sampled_from([words for name, values in WRONG.items() for words in spelled(name, values)])
seen: Counter = Counter()


def attempt(data, runs, words) -> tuple[int, str]:
    """Trains with these options; checks what holds of every end; returns exit status and errors."""
    base = [
        "train",
        f"--data_dir={data}",
        f"--checkpoint_dir={runs}",
        "--pretrained=0",
        "--epochs=1",
        "--device=cpu",
        "--model=squeezenet1_1",
        "--image_size=33",
        "--batch_size=6",
        "--num_workers=0",
        "--quiet",
    ]
    status, errors = run([*base, *words])
    assert "Traceback" not in errors
    assert errors.count("\n") <= 8
    results = list(runs.rglob("result.json"))
    if status == 0:
        assert len(results) == 1
        assert sum(map(sum, json.loads(results[0].read_text())["confusion"])) == 3
    else:
        assert errors.startswith("error: ") and not results
    shutil.rmtree(runs)
    seen[status] += 1
    return status, errors


@QUICK
@given(combinations)
def test_every_combination_trains_or_is_refused(data, tmp_path_factory, words):
    status, errors = attempt(data, tmp_path_factory.mktemp("runs"), words)
    extreme = any("1e+30" in word for word in words)
    assert status in (0, 2) or (status == 1 and extreme and ("finite" in errors or "overflow" in errors)), errors


@QUICK
@given(combinations, one_wrong)
def test_every_wrong_value_is_refused(data, tmp_path_factory, words, wrong):
    assert attempt(data, tmp_path_factory.mktemp("runs"), [*words, *wrong])[0] == 2


hostile_words = st.one_of(
    st.sampled_from([f"--{name}" for name in option.options_of("train")]),
    st.sampled_from(sorted(option.COMMANDS)),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["--", "-", "=", "--=", "--x", "@f"]),
)


@settings(QUICK, max_examples=10 * EXAMPLES)
@given(st.lists(hostile_words, max_size=6))
def test_hostile_words_are_parsed_or_refused(words):
    """The parser alone: options, commands and noise in any order."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            options = parsing.parse(words)
        except utils.UserError as error:
            assert str(error).strip()
        except SystemExit as ended:
            assert ended.code == 0
        else:
            assert options.command in option.COMMANDS


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
names = st.sampled_from([*option.options_of("train")] + ["unknown", "inputs"])


@settings(QUICK, max_examples=10 * EXAMPLES)
@given(st.one_of(values, st.fixed_dictionaries({"options": st.dictionaries(names, values, max_size=3)})))
def test_hostile_configs_are_read_or_refused(tmp_path_factory, content):
    """A config.json of any content gives options as valid as a command line's, or one message."""
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(content))
    try:
        options = parsing.parse(["train", f"--config={file}"])
    except utils.UserError as error:
        assert str(error).strip()
    else:
        assert options.epochs >= 1 and isinstance(options.model, str) and options.batch_size >= options.accumulate
