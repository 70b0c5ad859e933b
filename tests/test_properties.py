"""Any combination of options either trains to the end or is refused in words; hostile words never raise.

PROPERTY_EXAMPLES=500 pytest tests/test_properties.py tries 500 combinations instead of 30.
"""

import contextlib
import io
import json
import os
import shutil

import pytest
import tiny

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
import option

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "30"))
QUICK = settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 30, database=None,
                 suppress_health_check=list(HealthCheck))  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.draw(tmp_path_factory.mktemp("data"), train=15, test=3)


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        tiny.leave_out_pictures(patch)
        yield


def run(words) -> tuple[int, str]:
    """Exit status and what went to stderr; an exception that gets out fails the test."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main.main(words)
        except SystemExit as ended:  # --help and --version
            status = ended.code
    return status, errors.getvalue()


def some(name: str, *values: object):
    """The option with one of these values, or not at all, which is likelier."""
    return st.one_of(st.just([]), st.just([]), st.sampled_from([[f"--{name}={value}"] for value in values]))


def flag(name: str):
    return st.sampled_from([[], [], [f"--{name}"]])


# Values that are wrong alone stand last in their rows; others are wrong only beside one another.
combinations = st.tuples(
    some("batch_size", 1, 2, 3, 7, 12, 100, 2**31, 0, -1, "x"), some("accumulate", 1, 2, 3, 7, 12, 0, 1.5),
    some("epochs", 1, 2, 0), some("image_size", 16, 33, 40, 15, 5000, "large"), some("ema", 0, 0.5, 0.999999, 1),
    flag("amp"), some("amp_dtype", "auto", "bfloat16", "float16", "float64"), flag("tf32"),
    some("optimizer", "SGD", "ADAMW", "adam", "LION"), some("learning_rate", 1e-9, 0.1, 1e30, 0, "nan", "inf"),
    some("weight_decay", 0, 0.1, 1e30, -1), some("decay_type", "step", "step_warmup", "cosine_warmup", "linear"),
    some("warmup_epochs", 0, 0.1, 1, 2, 1e9, -1, "nan"), some("clip_grad_norm", 1e-9, 1, 1e30, 0),
    some("label_smoothing", 0, 0.1, 0.99, 1), some("augment", "flip", "crop", "trivial", "none", "rotate"),
    some("mixup", 0, 0.2, 1, 1e-300, 1e30, -1), some("cutmix", 0, 0.2, 1, 1e-300, 1e30, -1),
    some("freeze_epochs", 0, 1, 2, -1), some("patience", 1, 5, 0), some("seed", 0, 7, 2**32, 2**63 - 1, 2**64, -1),
    some("num_classes", 3, 4, 1), some("normalize", "none", "imagenet", "zca"), some("cache", "none", "memory", "disk"),
    some("num_workers", 0, 2**31, -1), some("log_interval", 1, 3, 10**9, 0), flag("no-channels_last"),
    some("checkpoint_every", "1u", "2u", "0.00001m", "1e9m", "infu", "nanm", "0u", "1.5u", "m", ""),
    some("resume", "auto", "yes", "no"), flag("overwrite"), flag("sync_batchnorm"), flag("skip_unreadable"),
    some("model", "squeezenet1_1", "ShuffleNet_V2_x0_5", "mnasnet0_5", "resnet999", "", "fcn_resnet50"),
    some("device", "cpu", "cpu:0", "meta", "cuda:99", "cuda:-1", "toaster", "", "mps"),
    some("checkpoint_name", "a", "a/b", "..", "/absolute", "x" * 300, "new\nline", "\ud800", ".", "-"),
    some("pretrained_path", "/nonexistent", "/", "/dev/null"), some("config", "/nonexistent", "/dev/null", "/", ""),
).map(lambda parts: [word for part in parts for word in part])  # fmt: skip


@QUICK
@given(combinations)
def test_every_combination_trains_or_is_refused(data, tmp_path_factory, words):
    runs = tmp_path_factory.mktemp("runs")
    base = ["train", f"--data_dir={data}", f"--checkpoint_dir={runs}", "--pretrained=0", "--epochs=1", "--device=cpu",
            "--model=squeezenet1_1", "--image_size=33", "--batch_size=6", "--num_workers=0", "--quiet"]  # fmt: skip
    if "--cache=none" not in words:  # workers are processes then, and cost seconds
        words = [*words]
    status, errors = run([*base, *words])
    assert "Traceback" not in errors
    assert errors.count("\n") <= 8
    results = list(runs.rglob("result.json"))
    if status == 0:
        assert len(results) == 1
        content = json.loads(results[0].read_text())
        assert sum(map(sum, content["confusion"])) == 3
    else:
        assert status in (1, 2), errors
        assert errors.startswith("error: ") and not results
        assert status == 2 or "finite" in errors or "overflow" in errors, errors
    shutil.rmtree(runs)


hostile_words = st.one_of(
    st.sampled_from([word for action in option.build_parser("train")._actions for word in action.option_strings]),
    st.sampled_from(sorted(option.COMMANDS)), st.text(max_size=12), st.sampled_from(["--", "-", "=", "--=", "--x", "@f"]),
    st.integers().map(str), st.floats().map(str),
)  # fmt: skip


@settings(QUICK, max_examples=10 * EXAMPLES)
@given(st.lists(hostile_words, max_size=6))
def test_hostile_words_are_parsed_or_refused(words):
    """The parser alone: options, commands and noise in any order."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            options = option.parse(words)
        except option.UserError as error:
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
names = st.sampled_from([action.dest for action in option.build_parser("train")._actions] + ["unknown", "trained_with"])


@settings(QUICK, max_examples=10 * EXAMPLES)
@given(st.one_of(values, st.fixed_dictionaries({"options": st.dictionaries(names, values, max_size=3)})))
def test_hostile_configs_are_read_or_refused(tmp_path_factory, content):
    """A config.json of any content gives options as valid as a command line's, or one message."""
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(content))
    try:
        options = option.parse(["train", f"--config={file}"])
    except option.UserError as error:
        assert str(error).strip()
    else:
        assert options.epochs >= 1 and isinstance(options.model, str) and options.batch_size >= options.accumulate
