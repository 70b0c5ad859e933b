"""An option that is typed acts, is refused, or is said to have no effect: over all options of all commands."""

import argparse
import contextlib
import dataclasses
import importlib

import pytest
import tiny

import main
from command_line import groups, helping, idle, parsing
from command_line.kinds import CALL, PRECISION, REPEAT
from command_line.presets import OWN_DEFAULTS
from option import COMMANDS, options_of
from utils import UserError

# Options that parse() itself turns into values of others, or that choose the command.
AT_PARSING = {"config", "preset", "evaluate"}
# Commands whose trainings are processes of their own take all options of a training but these from their words.
NOT_HANDED_ON = (CALL, PRECISION, REPEAT)


def acting(command: str) -> set[str]:
    """Return the options of a command that may have an effect in it."""
    return set(options_of(command)) - idle.never_acts(command).keys() - AT_PARSING


def said(*words: str, processes: int = 1) -> str:
    options = parsing.parse([str(word) for word in words])
    return " ".join(idle.said(options.command, options.typed, vars(options), processes=processes))


GROUPS = (groups.Place, groups.Data, groups.Reading, groups.Model, groups.Computing, groups.Training, groups.Recording)
OF_ONE_COMMAND = {
    "audit": groups.Auditing,
    "compare": groups.Comparison,
    "doctor": groups.Examination,
    "evaluate": groups.Evaluation,
    "export": groups.Export,
    "inspect": groups.Inspection,
    "predict": groups.Prediction,
    "prepare": groups.Preparation,
    "report": groups.Redrawing,
}


def fields_of(group) -> set[str]:
    return {field.name for field in dataclasses.fields(group)}


@pytest.mark.parametrize("command", sorted(OF_ONE_COMMAND))
def test_a_command_has_every_option_of_its_group(command):
    assert fields_of(OF_ONE_COMMAND[command]) <= set(options_of(command))


def test_the_typed_groups_are_the_options_of_a_training_and_of_a_finished_run():
    """But those that parse() uses up, and --quiet."""
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert sorted(names) == sorted({*options_of("train"), "checkpoint"} - {"preset", "evaluate", "quiet"})


def read_from_groups(patch: pytest.MonkeyPatch) -> None:
    """Let the typed groups note which of their options are read."""

    def note(group, name):
        Recorder.read.add(name)
        return object.__getattribute__(group, name)

    for group in {*GROUPS, *OF_ONE_COMMAND.values()}:
        patch.setattr(group, "__getattribute__", note)


class Recorder(parsing.Options):
    """Options that note which of them are read."""

    read: set[str] = set()

    def __init__(self, options: parsing.Options):
        super().__init__(**vars(options))
        self.typed = options.typed

    def __getattribute__(self, name):
        Recorder.read.add(name)
        return super().__getattribute__(name)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        tiny.leave_out_pictures(patch)
        patch.setattr(Recorder, "read", set())
        read_from_groups(patch)
        patch.setattr(main, "parse", lambda *words, **more: Recorder(parsing.parse(*words, **more)))
        assert tiny.train(data, runs) == 0
        yield data, runs, set(Recorder.read)


COMMAND_LINES = {
    "evaluate": [],
    "predict": ["DATA"],
    "compare": ["--precisions=fp32"],
    "audit": ["--folds=2"],
    "inspect": ["--out=OUT", "--precisions=fp32", "--batch_size=4", "--model=tiny_classifier", "--image_size=36"],
    "export": [],
}


@pytest.mark.parametrize("command", ["train", *COMMAND_LINES])
def test_every_option_that_a_command_offers_is_read_or_said(command, trained, tmp_path, monkeypatch):
    data, runs, read = trained
    importlib.import_module("commands.audit")  # before it could take over the function below for good
    monkeypatch.setattr("commands.compare.train_all", lambda *_, **__: None)
    monkeypatch.setattr("commands.compare.report_runs", lambda *_: [])
    monkeypatch.setattr("commands.audit.train_all", lambda *_, **__: None)
    monkeypatch.setattr("commands.audit.report_audit", lambda *_: None)
    monkeypatch.setattr("commands.export.export_onnx", lambda *_, **__: "written")
    if command != "train":
        monkeypatch.setattr(Recorder, "read", set())
        own = [word.replace("DATA", str(data)).replace("OUT", str(tmp_path)) for word in COMMAND_LINES[command]]
        name = [] if command in ("compare", "audit", "inspect") else ["--checkpoint_name=run"]
        place = [] if command in ("predict", "export") else [f"--data_dir={data}"]
        device = [] if command == "export" else ["--device=cpu", "--num_workers=1"]
        assert main.main([command, f"--checkpoint_dir={runs}", *name, *place, *device, *own]) == 0
        read = set(Recorder.read)
    if command in ("compare", "audit"):
        read |= {name for name, option in options_of("train").items() if option.role not in NOT_HANDED_ON}
        read |= {"amp", "amp_dtype", "tf32"}  # compare refuses them, audit trains in that precision
    if command == "inspect":
        read |= {"inputs", "checkpoint_dir"}  # read only beside --script, and beside --checkpoint_name
    assert sorted(acting(command) - read) == []


@pytest.mark.parametrize("command", ["doctor", "prepare", "report"])
def test_a_command_without_a_run_has_every_option_in_its_group(command):
    """Prepare asks which of its sources was named by whether another one was."""
    wanted = fields_of(OF_ONE_COMMAND[command])
    assert sorted(acting(command) - wanted - {"quiet", "check"}) == []


def words_of(command: str, name: str) -> list[str]:
    """Words that give an option of a command any value that is not its default."""
    option = options_of(command)[name]
    default = OWN_DEFAULTS.get(command, {}).get(name, option.default)
    if option.is_flag:
        return [f"--no-{name}" if default else f"--{name}"]
    some = ("x", "2", "61", "0.5", "10,80,10", "1,2", "crop", "10m", "1h", "fp32", "wandb")
    for value in option.kind.get("choices", some):
        with contextlib.suppress(ValueError, TypeError, argparse.ArgumentTypeError):
            if option.kind.get("type", str)(str(value)) != default:
                return [f"--{name}={value}"]
    raise AssertionError("no value fits")


NEVER = [(command, name) for command in COMMANDS for name in sorted(idle.never_acts(command))]


@pytest.mark.parametrize("command, name", NEVER, ids=map("-".join, NEVER))
def test_an_option_that_never_acts_is_refused_by_name_and_not_shown(command, name, tmp_path):
    words = [command, f"--checkpoint_dir={tmp_path}", *words_of(command, name)]
    with pytest.raises(UserError, match=f"^{command} takes no --{name}: "):
        parsing.parse([*words, *(["x.jpg"] if command == "predict" else [])])
    shown = helping.build_parser(command, everything=True).format_help()
    assert not [line for line in shown.splitlines() if line.startswith(f"  --{name} ")]


MODES = {
    ("prepare", "--check"): ("data_dir", "labels", "window", "max_megapixels", "model", "json"),
    ("prepare", "--demo"): ("data_dir", "train_images", "test_images", "seed"),
    ("prepare", "--archive=x.zip"): ("data_dir", "archive_encoding"),
    ("prepare", "--download"): ("data_dir",),
    ("prepare", "--clean"): ("data_dir",),
    ("compare", "--runs=a"): ("checkpoint_dir", "checkpoint_name", "open"),
    ("compare", "--report_only"): ("checkpoint_dir", "checkpoint_name", "open"),
    ("doctor", "--ladder"): ("device", "model", "image_size", "batch_size", "out"),
    ("inspect", "--module=m.py"): (
        "device",
        "precisions",
        "diary",
        "out",
        "full",
        "strict",
        "open",
        "layers",
        "find_layers",
    ),
}


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_a_mode_says_which_options_of_the_others_do_nothing(mode, tmp_path):
    """Each option of the command is said, is refused, or is on the list of those that act."""
    command, *words = mode
    own = words[0].partition("=")[0][2:]
    for name in options_of(command):
        if name in (own, "quiet", "evaluate"):
            continue
        typed = f"--config={tmp_path / 'config.json'}" if name == "config" else words_of(command, name)[0]
        (tmp_path / "config.json").write_text('{"options": {}}')
        try:
            text = said(*mode, typed)
        except UserError as error:
            text = str(error)
            assert name not in MODES[mode], text
        assert (f"--{name}" in text) == (name not in MODES[mode]), (typed, text)


@pytest.mark.parametrize(
    "words, names",
    [
        ("--freeze_epochs=all --backbone_lr=0.3 --layer_decay=0.7", "--backbone_lr, --layer_decay have"),
        ("--freeze_epochs=4 --epochs=4 --layer_decay=0.7", "--layer_decay has"),
        ("--freeze_epochs=3 --epochs=4 --layer_decay=0.7", ""),
        ("--preset=probe --backbone_lr=0.3", "--backbone_lr has"),
        ("--preset=finetune --freeze_epochs=all", ""),  # nobody typed the preset's --backbone_lr
        ("--sync_batchnorm", "--sync_batchnorm has"),
        ("--weight_decay=0 --no-decay_norms", "--decay_norms has"),
        ("--no-decay_norms", ""),
        ("--patience=5 --epochs=5", "--patience has"),
        ("--patience=4 --epochs=5", ""),
        ("--pretrained=0 --pretrained_path=x.pt", "--pretrained has"),
        ("--pretrained_path=x.pt", ""),
        ("evaluate --precisions=fp32 --amp", "--amp has"),
        ("evaluate --amp", ""),
        ("export --safetensors --tta=flip", "--tta has"),
        ("inspect --checkpoint_name=run --model=vgg11 --pretrained=1", "--model, --pretrained have"),
        ("inspect --model=vgg11 --pretrained=1", ""),
        ("--evaluate --epochs=3 --split=10,80,10", "--epochs has"),
        ("compare --sync_batchnorm", "--sync_batchnorm has"),
    ],
)
def test_options_that_others_make_idle_are_said(words, names):
    text = said(*words.split())
    assert names in text if names else text == ""


def test_several_processes_share_batch_statistics():
    assert said("--sync_batchnorm", processes=2) == ""


def test_the_trainings_of_a_comparison_say_nothing_that_nobody_typed():
    words = parsing.training_words(vars(parsing.parse(["compare"])))
    assert said("train", *words) == ""


def test_it_is_said_where_it_is_read(data, tmp_path, capsys):
    assert tiny.train(data, tmp_path, "--patience=9", "--quiet") == 0
    assert "--patience has no effect" in capsys.readouterr().out


def test_divisions_that_divide_nothing_are_said(data, tmp_path, capsys):
    """The tiny data set has a test part, and gets a validation part from its training images."""
    assert tiny.train(data, tmp_path, "--split=50,25,25") == 0
    assert "the last share of --split has no effect: the test part is given" in capsys.readouterr().out
    assert idle.about_division({"split"}, "50,50", ("validation",)) == []
    assert idle.about_division({"split"}, "50,25,25", ("validation", "test")) == []
    assert idle.about_division(set(), "50,25,25", ()) == []  # a preset's
    (sentence,) = idle.about_division({"split", "group"}, "50,25,25", ())
    assert sentence == "--group, --split have no effect: all parts of the data set are given."
    assert idle.about_division({"split"}, "x/split.csv", ()) == []


def test_a_trained_run_is_tested_at_any_size(data, tmp_path, capsys):
    """Also at one below the size that its training began with."""
    assert tiny.train(data, tmp_path, "--image_size=64", "--start_size=36") == 0
    for command, more in (("evaluate", [f"--data_dir={data}"]), ("predict", [str(tiny.images(data)[0])])):
        words = [f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run", "--image_size=36", "--device=cpu"]
        assert main.main([command, *words, *more]) == 0, capsys.readouterr().err


def test_a_resumed_run_says_that_it_begins_from_no_weights(data, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        tiny.stop_after(patch, 2)
        assert tiny.train(data, tmp_path) == 130
    assert tiny.train(data, tmp_path, "--resume", "--pretrained_path=x.pt") == 0
    assert "--pretrained_path have no effect: the run goes on from its last.pt" in capsys.readouterr().out
