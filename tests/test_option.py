"""The command line: the frozen set of options, defaults, spelling, precedence, and no torch for --help.

Options are read here, never run. Run it alone: pytest tests/test_option.py
"""

import contextlib
import io
import json
import re
import subprocess
import sys

import pytest
from tiny import ROOT, run_main

import option
from command_line import helping, parsing, presets
from command_line.idle import never_acts
from utils import UserError, choose_device

RUN = "--checkpoint_dir --checkpoint_name --seed --config --quiet"
DATA = "--data_dir --demo --image_size --resize --start_size --normalize --cache --num_workers --skip_unreadable"
DATA += " --labels --group --split --window --max_megapixels --cache_limit"
MODEL = "--model --num_classes --pretrained --weights --pretrained_path"
DEVICE = "--device --amp --amp_dtype --float32_layers --tf32 --channels_last --compile --cuda_graphs"
TRAINING = (
    "--preset --batch_size --accumulate --epochs --optimizer --learning_rate --weight_decay --decay_norms "
    "--backbone_lr --layer_decay --decay_type --warmup_epochs --clip_grad_norm --label_smoothing --augment --mixup "
    "--cutmix --ema --freeze_epochs --patience --tta --sync_batchnorm --checkpoint_blocks"
    " --class_weights --sampler --best_by --fraction"
)
RECORDING = (
    "--log_interval --watch --resume --overwrite --max_time --checkpoint_every --log --tensorboard --safetensors"
)
TRAINED = f"{RUN} {DATA} {DEVICE} --tta --batch_size --checkpoint"
ALL = f"{RUN} {DATA} {MODEL} {DEVICE} {TRAINING} {RECORDING}"

# Scripts rely on these names: extend them here, don't rename them.
OPTIONS = {
    "train": f"{ALL} --evaluate --budget",
    "evaluate": f"{TRAINED} --evaluate --precisions --out --csv --json",
    "predict": f"{TRAINED} --top_k --min_confidence --csv --json --submission --embed --contact_sheet --explain",
    "compare": f"{ALL} --precisions --seeds --ladder --report_only --runs --open",
    "audit": f"{ALL} --folds",
    "report": "--checkpoint_dir --checkpoint_name --quiet --open",
    "doctor": "--device --model --image_size --batch_size --data_dir --json --ladder --out",
    "inspect": f"{RUN} {DATA} {MODEL} --device --batch_size --precisions --full --checkpoint --out --module --diary "
    "--script --strict --open --layers --find_layers",
    "prepare": "--data_dir --download --archive --archive_encoding --demo --check --train_images --test_images --seed "
    "--clean --labels --window --max_megapixels --model --pretrained_path --json",
    "export": f"{RUN} --tta --checkpoint --out --safetensors --float16",
}
# fmt: off
SEED_DEFAULTS = {
    "model": "ResNet18", "num_classes": None, "pretrained": 1, "pretrained_path": None,
    "checkpoint_dir": "checkpoint", "checkpoint_name": "", "seed": 42, "batch_size": 256, "epochs": 120,
    "log_interval": 20, "amp": False, "learning_rate": 1e-4, "weight_decay": 1e-4, "optimizer": "ADAM",
    "decay_type": "cosine_warmup", "data_dir": "data", "demo": False, "device": "auto", "amp_dtype": "auto",
    "tf32": False, "image_size": 256, "warmup_epochs": None, "clip_grad_norm": None, "accumulate": 1,
    "resume": None, "compile": False, "channels_last": True, "cache": "auto", "normalize": "imagenet",
    "augment": "flip", "mixup": 0, "cutmix": 0, "ema": 0, "label_smoothing": 0, "freeze_epochs": 0,
    "patience": None, "preset": "tutorial", "start_size": 0, "decay_norms": True, "backbone_lr": 1,
    "layer_decay": 1, "tta": "none",
}
# fmt: on


def parse(*words):
    return parsing.parse(words)


def refused(*words):
    with pytest.raises(UserError) as error:
        parse(*words)
    return str(error.value)


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "runs" / "old" / "config.json"
    file.parent.mkdir(parents=True)
    stored = {"epochs": 7, "image_size": 99, "amp": True, "data_dir": "elsewhere", "checkpoint_name": "old"}
    stored |= {"overwrite": True, "batch_size": 12, "normalize": "none"}
    file.write_text(json.dumps({"options": stored}))
    return file


# ------------------------------------------------------------------------- names and defaults
@pytest.mark.parametrize("command", option.COMMANDS)
def test_the_set_of_options_is_frozen(command):
    found = [f"--{name}" for name in option.options_of(command) if name != "inputs"]
    assert sorted(found) == sorted(OPTIONS[command].split())


def test_the_defaults_are_the_seeds():
    found = vars(parse())
    assert {name: found[name] for name in SEED_DEFAULTS} == SEED_DEFAULTS and found["command"] == "train"


@pytest.mark.parametrize("command", option.COMMANDS)
def test_help_has_a_line_for_every_option(command):
    text = helping.build_parser(command, everything=True).format_help()
    for name, found in option.options_of(command).items():
        if found.help != "==SUPPRESS==" and name not in never_acts(command):
            assert found.kind.get("metavar", "PATH") if name == "inputs" else re.search(rf"--{name}[ ,\n]", text)
    assert "==SUPPRESS==" not in text and "%(" not in text and "None" not in text
    assert max(map(len, text.splitlines())) <= 100


def help_of(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit, match="0"):
        parse(*words)
    return out.getvalue()


def test_the_first_help_has_the_options_that_most_runs_need_and_names_the_other(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    first = help_of("--help")
    assert len(first.splitlines()) < 70 and 12 <= first.count("\n  --") <= 20 and "--help all: all " in first
    assert "--mixup" not in first and "--mixup" in help_of("--help", "all") and "testing:" not in first


@pytest.mark.parametrize("command", option.COMMANDS)
def test_every_group_has_an_example_that_can_be_typed(command):
    examples = re.findall(r"^(?!commands)\w.*\((python main.py.*)\):$", help_of(command, "--help"), re.M)
    assert examples and all(parse(*example.split()[2:]).command == command for example in examples)


def test_help_groups_its_options_and_shows_defaults():
    text = help_of("--help", "all")
    for heading in ("run:", "data:", "model:", "device and precision:", "training:", "recording"):
        assert f"\n{heading}" in text.replace(" (python", ":(")
    for shown in ("(default: 256)", "(default: 0.0001)", "(default: cosine_warmup)", "(default: on)"):
        assert shown in text
    assert all(f"\n  {command} " in text for command in option.COMMANDS)


@pytest.mark.parametrize("words", [["compare", "--help"], ["--epochs", "0"]])
def test_help_and_wrong_options_import_no_torch(words):
    code = (
        "import sys, main\n"
        "try: status = main.main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'PIL', 'sklearn', 'matplotlib', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if "--help" in words else 2), done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------ spelling
def test_dashes_are_underscores():
    options = parse("--batch-size", "8", "--learning-rate=0.1", "--no_channels-last", "--no-amp", "--amp-dtype", "auto")
    assert (options.batch_size, options.learning_rate, options.channels_last) == (8, 0.1, False)


def test_values_keep_their_dashes():
    assert parse("--checkpoint-name", "my-run", "--data_dir=a-b/c-d").data_dir == "a-b/c-d"
    assert parse("--checkpoint-name", "my-run").checkpoint_name == "my-run"


@pytest.mark.parametrize(
    "words, suggestion",
    [
        (["--learning_rat", "1"], "--learning_rate"),
        (["--batchsize=3"], "--batch_size"),
        (["--ampp"], "--amp"),
        (["tran"], "train"),
        (["compair"], "compare"),
        (["--lr", "1"], "--learning_rate"),
        (["--gpu=0"], "--device"),
        (["-amp"], "--amp"),
        (["test"], "evaluate"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_one_that_was_meant(words, suggestion):
    assert f"did you mean {suggestion}?" in refused(*words)


@pytest.mark.parametrize(
    "words, answer",
    [
        ("--epochs 3 compare", "python main.py compare --epochs 3\n"),
        ("help", "python main.py --help"),
        ("help export", "python main.py export --help"),
        ("--amp=1", "--amp takes no value: type --amp\n"),
        ("--amp True --epochs 3", "--amp takes no value: type --amp\n"),
        ("--amp=0", "--amp takes no value: type --no-amp\n"),
        ("--no-amp true", "--no-amp takes no value: type --no-amp\n"),
        ("--quiet=1", "--quiet takes no value: type --quiet\n"),
        ("--pretrained False", "type --pretrained 0\n"),
        ("--top_k 3", "train has no --top_k, which is an option of predict\n"),
        ("doctor photo.jpg", "doctor takes no argument 'photo.jpg'\n"),
    ],
)
def test_the_right_words_are_named(words, answer):
    assert answer in refused(*words.split())


def test_a_wrong_device_is_answered_with_those_that_people_have():
    with pytest.raises(UserError, match="--device gpu is no device: choose auto, cuda, cuda:1, mps or cpu"):
        choose_device("gpu")


def test_options_are_not_abbreviated():
    assert "--epoch" in refused("--epoch", "3")


# ------------------------------------------------------------------------------ bad numbers
IMPOSSIBLE = {
    "at least 1": "epochs=0 batch_size=-4 log_interval=0 accumulate=0 patience=0",
    "at least 0": "weight_decay=-1 warmup_epochs=-1 num_workers=-1 seed=-1",
    "greater than 0": "learning_rate=-1 learning_rate=0 learning_rate=nan clip_grad_norm=0",
    "and finite": "learning_rate=inf",
    "less than 1": "ema=1 label_smoothing=1",
    "not an integer": "epochs=1.5",
    "at least 16": "image_size=8",
    "at least 2": "num_classes=1",
    "ADAM": "optimizer=LION",
    "cosine_warmup": "decay_type=linear",
    "bfloat16": "amp_dtype=int8",
    "invalid choice": "pretrained=2",
    "10m": "checkpoint_every=5",
    "500u": "checkpoint_every=0u checkpoint_every=1.5u",
    "auto": "resume=maybe",
}


@pytest.mark.parametrize("named", IMPOSSIBLE)
def test_impossible_values_are_refused_by_name(named):
    for word in IMPOSSIBLE[named].split():
        message = refused(f"--{word}")
        assert f"--{word.partition('=')[0]}" in message and named in message, message


@pytest.mark.parametrize(
    "words, named",
    [
        (["--accumulate", "9", "--batch_size", "8"], "--accumulate"),
        (["--tf32", "--amp"], "exclude"),
        (["--cuda_graphs", "--accumulate", "2"], "--accumulate"),
        (["predict", "x.jpg", "--top", "3"], "See: python main.py predict --help"),
        (["--amp_dtype", "float16"], "without --amp"),
        (["--warmup_epochs", "9", "--epochs", "3"], "--warmup_epochs"),
        (["--freeze_epochs", "4", "--epochs", "3"], "--freeze_epochs"),
        (["--resume", "--overwrite"], "exclude"),
        (["--checkpoint_name", "../up"], "--checkpoint_name"),
        (["--checkpoint_name", "/root"], "--checkpoint_name"),
        (["--checkpoint_name", "a\nb"], "--checkpoint_name"),
        (["compare", "--precisions", "fp8"], "fp32"),
        (["compare", "--precisions", ","], "fp32"),
        (["predict"], "PATH"),
        (["prepare"], "--download"),
        (["--config", "absent.json"], "absent.json"),
        (["--decay_type", "step", "--warmup_epochs", "3"], "step_warmup"),
        (["compare", "--amp"], "--precisions"),
        (["compare", "--amp_dtype", "float16"], "--precisions"),
        (["compare", "--tf32"], "--precisions"),
        (["evaluate", "--amp_dtype", "float16"], "without --amp"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, named):
    assert named in refused(*words)


def test_a_comparison_takes_all_but_the_precision_from_a_config(config):
    options = parse("compare", "--config", str(config))
    assert (options.epochs, options.amp) == (7, False)


def test_files_behind_two_dashes_keep_theirs():
    assert parse("predict", "--batch-size=4", "--", "--my-picture.jpg").inputs == ["--my-picture.jpg"]
    for words in (["a.pt", "b.pt", "x.jpg", "-", "--amp"], ["a.pt", "--amp", "x.jpg", "-"], ["a", "b"]):
        found = parse("predict", "--checkpoint", *words)
        assert found.checkpoint == [word for word in words if word.endswith(".pt")] or ["a"]
        assert found.inputs == [word for word in words if word in ("x.jpg", "-", "b")]


def test_files_may_stand_on_both_sides_of_an_option():
    assert parse("predict", "a.jpg", "--top_k", "3", "b.jpg").inputs == ["a.jpg", "b.jpg"]


# --------------------------------------------------------------------------------- precedence
def test_demo_sets_defaults_and_explicit_options_win():
    options = parse("--demo", "--epochs", "3")
    assert options.epochs == 3 and options.image_size == presets.DEMO["image_size"] and options.pretrained == 0
    assert parse("compare", "--demo").data_dir == presets.DEMO["data_dir"]
    assert parse("--demo", "--batch_size", "256").batch_size == 256  # even where the value is the usual default


def test_on_cuda_a_demo_has_other_sizes():
    asked = []

    def is_cuda(device):
        asked.append(device)
        return True

    options = parsing.parse(["--demo", "--device", "cuda:1", "--epochs", "3"], is_cuda=is_cuda)
    sizes = presets.DEMO | presets.DEMO_ON_CUDA | {"epochs": 3}
    assert {name: getattr(options, name) for name in sizes} == sizes and asked == ["cuda:1"]
    parsing.parse(["prepare", "--demo"], is_cuda=is_cuda)
    parsing.parse(["--epochs", "3"], is_cuda=is_cuda)
    assert len(asked) == 1, "only a demo asks for the device"


def test_command_line_then_config_then_demo_then_default(config):
    options = parse("--demo", "--config", str(config), "--batch_size", "5")
    assert options.batch_size == 5  # the command line
    assert (options.epochs, options.image_size, options.data_dir) == (7, 99, "elsewhere")  # the config
    assert options.learning_rate == presets.DEMO["learning_rate"] and options.weight_decay == 1e-4
    assert options.amp is True and parse("--config", str(config), "--no-amp").amp is False
    assert options.overwrite is False and options.checkpoint_name == ""  # never from a config


@pytest.mark.parametrize("words", [["evaluate"], ["--evaluate"], ["predict", "x.png"], ["inspect"]])
def test_commands_on_a_run_take_its_own_options(config, words):
    own = [*words, f"--checkpoint_dir={config.parent.parent}", "--checkpoint_name=old"]
    options = parse(*own)
    assert (options.image_size, options.normalize, options.data_dir) == (99, "none", "elsewhere")
    if words[0] != "predict":
        assert parse(*own, "--data_dir=here").data_dir == "here"


def test_without_a_config_the_checkpoint_says_how_images_are_read(tmp_path):
    for words in (["evaluate"], ["evaluate", "--demo"], ["predict", "x.png"], ["export"]):
        options = parse(*words, f"--checkpoint_dir={tmp_path}", "--checkpoint_name=gone")
        assert options.image_size is options.normalize is None
    assert parse("evaluate", "--demo").data_dir == presets.DEMO["data_dir"]
    assert parse("evaluate", "--image_size=77").image_size == 77


def test_evaluate_may_stand_behind_a_trainings_own_options(config):
    training = "--model=ResNet50 --epochs=3 --amp --batch_size=64 --learning_rate=0.1 --checkpoint_name=old --evaluate"
    options = parse(*training.split(), f"--checkpoint_dir={config.parent.parent}")
    assert options.command == "evaluate" and options.batch_size == 64 and options.amp
    assert "did you mean --epochs" in refused("--evaluate", "--epoch", "3")
    assert "--learning_rate" in refused("evaluate", "--learning_rate", "1")  # the command itself takes none


def test_a_comparisons_training_words_give_its_options_back():
    words = "--epochs=3 --no-channels_last --ema=0.5 --clip_grad_norm=1.0 --checkpoint_every=5u --optimizer=SGD"
    options = parse("compare", *words.split(), "--data_dir=a folder", "--precisions", "fp32")
    again = parse("train", *parsing.training_words(vars(options)))
    own = {"command", "precisions", "seeds", "ladder", "report_only", "runs", "evaluate", "open", "budget"}
    first, second = ({k: v for k, v in vars(found).items() if k not in own} for found in (options, again))
    assert first == second


def test_main_answers_a_wrong_option_with_two_lines_and_status_2():
    status, out, err = run_main(["--epochz", "3"])
    assert (status, out) == (2, "")
    assert err.splitlines() == ["error: train has no --epochz (did you mean --epochs?)", "See: python main.py --help"]
