"""main(argv) as a user calls it: training in each precision, the run directory, every command, every bad input.

Tiny scenes and small networks; what a run must write is the contract that scripts rely on.
Run it alone: pytest tests/test_main.py
"""

import csv
import json
import math
import shutil
import zipfile

import numpy as np
import pytest
import tiny
import torch
import torchvision
from PIL import Image
from tiny import SMALL, metrics

from command_line import parsing
from commands import compare
from images import demo
from pretrained.files import load_file

CLASSES = ["buildings", "forest", "glacier", "mountain", "sea", "street"]
PRECISIONS = ["fp32", "amp-bf16", "amp-fp16"]
FILES = "config.json split.csv metrics.jsonl metrics.csv last.pt best_model.pt result.json predictions.csv"
PICTURES = {"batch.png", "learning_curve.png", "confusion_matrix.png", "mistakes.png", "report.html"}
METRICS = (
    "epoch updates train_loss train_acc val_loss val_acc val_balanced_acc val_macro_f1 learning_rate "
    "loss_scale skipped_updates images_per_second data_wait_share busy_share seconds peak_memory_mb grad_norm "
    "elapsed skips image_size"
)
RESULT = (
    "test_acc balanced_acc macro_f1 macro test_loss best_epoch best_val_acc total_seconds images_per_second busy_share "
    "peak_memory_mb memory_kind precision device classes per_class confusion reserved_memory_mb device_name "
    "train_seconds skipped_updates calibration_error tta training_memory_mb specificity roc_auc "
    "average_precision top5_acc temperature calibrated_error refusals"
)


def read(folder, name):
    return json.loads((folder / name).read_text())


def words(folder, checkpoints, name="run", *more):
    return [f"--data_dir={folder}", f"--checkpoint_dir={checkpoints}", f"--checkpoint_name={name}", *SMALL, *more]


def shown_accuracy(out):
    return float(next(line for line in out.splitlines() if line.startswith("Test accuracy")).split()[2])


# -------------------------------------------------------------------------- training, each precision


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_run_writes_what_the_contract_says(trained, name):
    folder, status, out, err = trained[name]
    label = {"fp32": "FP32", "amp-bf16": "AMP bfloat16", "amp-fp16": "AMP float16"}[name]
    assert status == 0 and err == "" and f"on cpu: {label} (" in out
    assert {path.name for path in folder.iterdir()} >= {*FILES.split()} | (PICTURES if name == "fp32" else set())
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp") or path.name == "failure.json"]
    lines = metrics(folder)
    result = read(folder, "result.json")
    assert set(result) == {*RESULT.split()}
    assert all(set(line) == {*METRICS.split()} for line in lines)
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["updates"] for line in lines] == [lines[0]["updates"] * line["epoch"] for line in lines]
    assert result["precision"] == name and result["device"] == "cpu" and result["classes"] == CLASSES
    assert result["memory_kind"] == "process resident peak" and result["peak_memory_mb"] > 50
    assert (result["training_memory_mb"] or 0) < result["peak_memory_mb"]
    assert 0 < result["train_seconds"] <= result["total_seconds"]
    best = max(lines, key=lambda line: (line["val_acc"], -line["val_loss"]))
    assert (result["best_epoch"], result["best_val_acc"]) == (best["epoch"], best["val_acc"])
    for line in lines:
        assert 0 <= line["data_wait_share"] < 1 and line["images_per_second"] > 0 and line["grad_norm"] > 0
        assert all(math.isfinite(line[key]) and line[key] >= 0 for key in ("train_loss", "val_loss"))
        assert all(0 <= line[key] <= 100 for key in ("train_acc", "val_acc"))
        assert (line["loss_scale"] is not None) == (name == "amp-fp16")
        assert line["skipped_updates"] == len(line["skips"])
    with open(folder / "metrics.csv", newline="") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [line["epoch"] for line in lines]


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_result_follows_from_its_confusion_matrix(trained, name):
    folder = trained[name][0]
    result = read(folder, "result.json")
    matrix = np.array(read(folder, "result.json")["confusion"])
    assert matrix.shape == (6, 6) and matrix.sum(1).tolist() == [3] * 6
    assert result["test_acc"] == pytest.approx(100 * matrix.trace() / 18)
    for place, label in enumerate(CLASSES):
        row = result["per_class"][label]
        assert row["support"] == 3 and row["recall"] == pytest.approx(matrix[place, place] / 3, abs=1e-6)
        predicted = matrix[:, place].sum()
        assert row["precision"] == pytest.approx(matrix[place, place] / predicted if predicted else 0, abs=1e-6)
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    counted = np.zeros((6, 6), int)
    for row in rows:
        counted[CLASSES.index(row["label"]), CLASSES.index(row["predicted"])] += 1
        assert sum(float(row[label]) for label in CLASSES) == pytest.approx(1, abs=1e-4)
        assert row["path"].split("/")[-2] == row["label"]
    assert np.array_equal(counted, matrix)


@pytest.mark.parametrize("name", PRECISIONS)
def test_checkpoints_are_plain_and_their_model_is_the_networks(trained, name):
    folder = trained[name][0]
    for file in ("best_model.pt", "last.pt"):
        content = torch.load(folder / file, weights_only=True)
        network = tiny.Classifier(num_classes=6)
        network.load_state_dict(content["model"])
        assert content["classes"] == CLASSES and {t.dtype for t in network.parameters()} == {torch.float32}
    assert (content["scaler"] != {}) == (name == "amp-fp16")


def test_config_records_options_versions_and_data(trained):
    config = read(trained["amp-bf16"][0], "config.json")
    assert config["options"]["amp"] is True and config["options"]["image_size"] == 33
    assert config["versions"]["torch"] == torch.__version__ and config["precision"] == "amp-bf16"
    assert config["precision_reason"] in trained["amp-bf16"][2]
    sizes = config["dataset"]
    assert (sizes["train"], sizes["val"], sizes["test"], sizes["classes"]) == (48, 12, 18, CLASSES)


def test_fp32_and_amp_start_alike_and_end_apart(trained):
    one, other = (torch.load(trained[name][0] / "last.pt", weights_only=True) for name in ("fp32", "amp-bf16"))
    assert one["fingerprint"] == other["fingerprint"]
    assert 0 < float((one["model"]["fc.weight"] - other["model"]["fc.weight"]).abs().max()) < 0.01


def test_the_summary_tells_what_a_user_wants_to_know(trained):
    folder, _, out, err = trained["fp32"]
    result = read(folder, "result.json")
    assert shown_accuracy(out) == pytest.approx(result["test_acc"], abs=0.01)
    for text in (
        *CLASSES,
        "process resident peak",
        "Best epoch",
        "Time",
        "48 training, 12 validation and 18 test",
        "epoch   2/2",
        str(folder),
    ):
        assert text in out
    assert err == ""


def test_quiet_prints_the_result_alone_and_still_warns(scenes_folder, tmp_path, run):
    more = ("--model=tiny_classifier", "--epochs=1", "--quiet", "--amp", "--amp_dtype=float16")
    status, out, err = run(words(scenes_folder, tmp_path, "a", *more))
    warning, *result = out.splitlines()
    assert status == 0 and warning.startswith("warning: on CPUs float16 is many times slower") and err == ""
    assert result[0].startswith("Test accuracy")


def test_a_run_without_a_name_is_called_after_model_and_precision(scenes_folder, tmp_path, run):
    given = words(scenes_folder, tmp_path, "", "--model=Tiny_Classifier", "--epochs=1", "--amp", "--quiet")
    status, out, err = run(given)
    assert (status, err) == (0, "") and out.startswith("Test accuracy")
    assert (tmp_path / "tiny_classifier_amp-bf16" / "result.json").exists()


def test_every_option_that_changes_training_trains(scenes_folder, tmp_path, run):
    more = (
        "--model=tiny_classifier --accumulate=3 --clip_grad_norm=1 --ema=0.5 --label_smoothing=0.1 --mixup=0.2 "
        "--cutmix=1 --augment=crop --freeze_epochs=1 --patience=5 --optimizer=sgd --decay_type=step_warmup "
        "--warmup_epochs=0.5 --cache=none --num_workers=0 --normalize=none --no-channels_last --log_interval=1 "
        "--checkpoint_every=2u --sync_batchnorm"
    )
    status, out, err = run(words(scenes_folder, tmp_path, "all", *more.split()))
    assert status == 0, err
    status, again, _ = run(["evaluate", f"--checkpoint_dir={tmp_path}", "--checkpoint_name=all"])
    assert status == 0 and shown_accuracy(again) == shown_accuracy(out)


def test_a_pretrained_run_starts_from_its_file(scenes_folder, trained, tmp_path, run):
    """At a rate of almost nothing, the best epoch tests as the run whose weights it began with."""
    weights = trained["amp-fp16"][0] / "best_model.pt"
    more = (f"--pretrained_path={weights}", "--learning_rate=1e-12", "--epochs=1", "--weight_decay=0")
    status, _, err = run(words(scenes_folder, tmp_path, "again", "--model=tiny_classifier", *more))
    assert status == 0, err
    one, other = (load_file(file)["model"]["fc.weight"] for file in (weights, tmp_path / "again" / "best_model.pt"))
    assert float((one - other).abs().max()) < 1e-9


# --------------------------------------------------------------------------------------- evaluate
@pytest.mark.parametrize("name, spelling", [("fp32", "--evaluate"), ("amp-bf16", "evaluate"), ("amp-fp16", "evaluate")])
def test_evaluate_finds_the_test_accuracy_again(trained, run, name, spelling):
    folder, _, out, _ = trained[name]
    status, again, err = run([spelling, f"--checkpoint_dir={folder.parent}", f"--checkpoint_name={name}"])
    assert status == 0 and err == "" and shown_accuracy(again) == shown_accuracy(out)
    assert f"{name} on" in again


def test_the_default_network_is_torchvisions_resnet18_and_tests_as_in_a_plain_loop(scenes_folder, tmp_path, run):
    status, _, err = run(words(scenes_folder, tmp_path, "run", "--epochs=1", "--quiet"))
    assert status == 0, err
    network = torchvision.models.resnet18(num_classes=6)
    network.load_state_dict(load_file(tmp_path / "run" / "best_model.pt")["model"])
    tail = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize((33, 33)),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = torchvision.datasets.ImageFolder(scenes_folder / "seg_test" / "seg_test", tail)
    with torch.no_grad():
        logits = torch.cat([network.eval()(image[None]) for image, _ in images])
    labels = torch.tensor(images.targets)
    result = read(tmp_path / "run", "result.json")
    assert images.classes == CLASSES
    assert 100 * float((logits.argmax(1) == labels).double().mean()) == pytest.approx(result["test_acc"])
    assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(result["test_loss"], rel=1e-3)


def test_evaluate_in_several_precisions(trained, run):
    folder = trained["fp32"][0]
    status, out, err = run(
        ["evaluate", f"--checkpoint_dir={folder.parent}", "--checkpoint_name=fp32", "--precisions=fp32,amp-bf16"]
    )
    rows = read(folder, "parity.json")
    assert status == 0 and list(rows) == ["fp32", "amp-bf16"] and "amp-bf16" in out
    assert rows["fp32"]["largest_logit_difference"] == 0 < rows["amp-bf16"]["largest_logit_difference"] < 1
    assert rows["fp32"]["accuracy"] == pytest.approx(read(folder, "result.json")["test_acc"])


# ---------------------------------------------------------------------------------------- demo
def test_demo_draws_its_data_and_trains_with_its_defaults(tmp_path, run, monkeypatch):
    draw = demo.draw_demo
    drawn = []
    monkeypatch.setattr(
        "images.demo.draw_demo", lambda root, **_: drawn.append(root) or draw(root, train_images=60, test_images=18)
    )
    monkeypatch.chdir(tmp_path)
    status, out, err = run(["--demo", "--checkpoint_name", "demo", "--epochs", "1", "--model", "tiny_classifier"])
    assert status == 0, err
    options = read(tmp_path / "checkpoint" / "demo", "config.json")["options"]
    assert (options["epochs"], options["image_size"], options["pretrained"]) == (1, 64, 0)
    assert (tmp_path / "data" / "demo" / "seg_train").exists() and len(drawn) == 1
    status, again, err = run(["evaluate", "--demo", "--checkpoint_name", "demo"])
    assert status == 0 and shown_accuracy(again) == shown_accuracy(out), err


# ------------------------------------------------------------------------------------- predict
def test_predict_writes_csv_json_and_a_sheet(trained, scenes_folder, tmp_path, run):
    folder = trained["fp32"][0]
    test = scenes_folder / "seg_test" / "seg_test"
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "json", "png")}
    given = ["predict", test, broken, f"--checkpoint_dir={folder.parent}", "--checkpoint_name=fp32"]
    written = [f"--csv={files['csv']}", f"--json={files['json']}", f"--contact_sheet={files['png']}"]
    status, out, err = run([*given, *written, "--top_k=2", "--batch_size=7"])
    assert status == 1 and "1 of 19 files could not be read" in err
    assert "18 images" in out and "broken.jpg" in out
    rows = json.loads(files["json"].read_text())
    with open(files["csv"], newline="") as file:
        table = list(csv.DictReader(file))
    with open(folder / "predictions.csv", newline="") as file:
        expected = {row["path"]: row for row in csv.DictReader(file)}
    assert len(rows) == len(table) == 18
    for row, line in zip(rows, table, strict=True):
        tested = expected[str(row["path"]).removeprefix(f"{scenes_folder}/")]
        assert len(row["top"]) == 2 and row["top"][0]["class"] == line["predicted"] == tested["predicted"]
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert row["top"][0]["probability"] == pytest.approx(float(tested["confidence"]), abs=1e-4)
    with Image.open(files["png"]) as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize("inputs, named", [(["absent.jpg"], "absent.jpg"), (["empty"], "holds no image")])
def test_predict_names_what_it_cannot_find(trained, tmp_path, run, monkeypatch, inputs, named):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = trained["fp32"][0]
    status, _, err = run(["predict", *inputs, f"--checkpoint_dir={folder.parent}", "--checkpoint_name=fp32"])
    assert status == 2 and named in err


# ------------------------------------------------------------------------------------- compare
@pytest.fixture(scope="module")
def comparison(scenes_folder, tmp_path_factory, run):
    """Two precisions compared by processes of their own, as the command does it: (folder, words, stdout)."""
    folder = tmp_path_factory.mktemp("comparison")
    given = ["compare", *words(scenes_folder, folder, "both", "--model=tiny_classifier", "--epochs=1")]
    given.append("--precisions=fp32,amp-bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "subprocess", tiny.Subprocess)
        with tiny.drawing():
            status, out, err = run(given)
    assert status == 0, err
    return folder / "both", given, out


def test_compare_writes_a_run_a_precision_and_one_table(comparison):
    folder, _, out = comparison
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["amp-bf16", "fp32"]
    assert {"performance_table.md", "comparison.json", "comparison.png"} <= {path.name for path in folder.iterdir()}
    for name in ("fp32", "amp-bf16"):
        assert {path.name for path in (folder / name).iterdir()} >= {*FILES.split()}
        assert read(folder / name, "result.json")["precision"] == name
    table = (folder / "performance_table.md").read_text()
    for heading in ("Algorithm", "Test Accuracy", "Memory", "Total Training Time"):
        assert heading in table
    assert f"{read(folder / 'fp32', 'result.json')['test_acc']:.2f}" in table and str(folder) in out


def test_compare_does_not_run_again_what_is_finished(comparison, run, monkeypatch):
    folder, given, _ = comparison
    started = []
    monkeypatch.setattr(compare, "_process", lambda given, _: started.append(given) or 1)
    status, out, err = run(given)
    assert status == 0 and started == [] and out.count("already finished") == 2
    status, _, err = run([*given, "--learning_rate=0.5"])
    assert status == 2 and started == [] and "--learning_rate" in err and "--overwrite" in err
    (folder / "amp-bf16" / "result.json").rename(folder / "kept")
    try:
        run(given)
    finally:
        (folder / "kept").rename(folder / "amp-bf16" / "result.json")
        (folder / "amp-bf16" / "failure.json").unlink(missing_ok=True)
    assert len(started) == 1 and "--resume=auto" in started[0] and "--amp_dtype=bfloat16" in started[0]
    run([*given, "--float32_layers=fc"])
    assert started[1:] and all("--float32_layers=fc" in each for each in started[1:])
    assert [word for word in started[1] if word.startswith("--checkpoint_name")] == [
        "--checkpoint_name=amp-bf16-layers"
    ]
    shutil.rmtree(folder / "amp-bf16-layers")


@pytest.mark.usefixtures("drawn")
def test_report_only_redraws_from_files_and_opens_the_page(comparison, run, monkeypatch):
    folder, given, _ = comparison
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or False)
    for name in ("performance_table.md", "comparison.png"):
        (folder / name).unlink()
    status, out, err = run(
        ["compare", f"--checkpoint_dir={folder.parent}", f"--checkpoint_name={folder.name}", "--report_only", "--open"]
    )
    assert status == 0, err
    assert (folder / "performance_table.md").exists() and (folder / "comparison.png").exists()
    assert opened == [(folder / "report.html").resolve().as_uri()] and "no browser could be started" in out
    assert out.index("results: ") < out.index("\nFP32 ") < out.index("\nAMP bfloat16: ")


def test_runs_compares_folders_of_ones_own(trained, tmp_path, run):
    folders = [trained[name][0] for name in ("fp32", "amp-bf16")]
    status, out, err = run(["compare", f"--checkpoint_dir={tmp_path}", "--checkpoint_name=own", "--runs", *folders])
    assert status == 0, err
    rows = read(tmp_path / "own", "comparison.json")["rows"]
    assert "AMP bfloat16" in out and [row["precision"] for row in rows] == ["fp32", "amp-bf16"]
    assert rows[0]["images_per_second"]["mean"] == metrics(folders[0])[1]["images_per_second"]  # not the first epoch
    status, _, err = run(["compare", f"--checkpoint_dir={tmp_path}", "--runs", tmp_path / "nothing"])
    assert status == 2 and "nothing" in err


def test_a_precision_that_fails_is_recorded_and_the_others_stand(comparison, run, monkeypatch):
    folder, given, _ = comparison
    monkeypatch.setattr(compare, "_process", lambda given, _: 1)
    status, out, err = run([*given[:-1], "--precisions=fp32,amp-fp16"])
    assert status == 1 and "amp-fp16: exit status 1" in err and "AMP float16" in out
    assert "exit status 1" in read(folder / "amp-fp16", "failure.json")["reason"]
    table = (folder / "performance_table.md").read_text()
    assert "AMP float16 | failed: exit status 1 |" in table
    shutil.rmtree(folder / "amp-fp16")  # the folder is shared with other tests


# ----------------------------------------------------------------------------------- bad input
def test_bad_data_is_named_with_status_2(tmp_path, run):
    data = tiny.draw(tmp_path / "data", classes=("sea",))
    status, _, err = run(words(data, tmp_path / "runs"))
    assert status == 2 and err.startswith("error: ") and "1 class folder" in err and "at least two" in err
    assert not (tmp_path / "runs" / "run" / "config.json").exists()


def test_no_data_names_the_three_ways_to_get_it(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(["--pretrained", "0"])
    assert status == 2 and all(way in err for way in ("--demo", "--download", "--archive", "--data_dir"))


@pytest.mark.parametrize(
    "more, named",
    [
        (["--num_classes=5"], "--num_classes 5"),
        (["--model=../../up"], "is not a torchvision classifier"),
        (["--pretrained_path=absent.pt"], "absent.pt"),
        (["--device=cuda:7"], "--device cpu"),
        (["--device=nonsense"], "--device nonsense"),
        (["--tf32", "--device=cpu"], "--tf32"),
    ],
)
def test_bad_options_are_named_with_status_2(scenes_folder, tmp_path, run, more, named):
    status, _, err = run(words(scenes_folder, tmp_path, "run", *more))
    assert status == 2 and err.startswith("error: ") and named in err and len(err.splitlines()) <= 6, err
    assert not (tmp_path / "run" / "config.json").exists()


def test_weights_and_checkpoints_that_do_not_fit_are_named(scenes_folder, trained, tmp_path, run):
    weights = trained["amp-fp16"][0] / "best_model.pt"
    status, _, err = run(words(scenes_folder, tmp_path, "run", f"--pretrained_path={weights}"))
    assert status == 2 and "missing" in err and "--model" in err
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "best_model.pt").write_bytes(weights.read_bytes()[:5000])
    for name, named in (("damaged", "damaged"), ("absent", "Runs there: damaged")):
        status, _, err = run(
            ["evaluate", f"--data_dir={scenes_folder}", f"--checkpoint_dir={tmp_path}", f"--checkpoint_name={name}"]
        )
        assert status == 2 and named in err, err


def test_another_data_sets_classes_are_refused(trained, tmp_path, run):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(5):
                Image.new("RGB", (40, 40), (index * 40, 0, 0)).save(tmp_path / part / name / f"{index}.png")
    folder = trained["fp32"][0]
    for command in ("evaluate", "inspect"):
        status, _, err = run(
            [command, f"--checkpoint_dir={folder.parent}", "--checkpoint_name=fp32", f"--data_dir={tmp_path}"]
        )
        assert status == 2 and "cat" in err and "buildings" in err


def test_output_without_a_folder_is_refused_before_the_work(trained, tmp_path, run):
    finished = [f"--checkpoint_dir={trained['fp32'][0].parent}", "--checkpoint_name=fp32"]
    for given in (
        ["predict", *finished, str(tmp_path), f"--contact_sheet={tmp_path / 'no' / 'x.png'}"],
        ["export", *finished, f"--out={tmp_path / 'no' / 'x.onnx'}"],
        ["doctor", f"--json={tmp_path / 'no' / 'x.json'}"],
    ):
        status, out, err = run(given)
        assert status == 2 and err.startswith(f"error: {tmp_path / 'no'}/x") and not out


def test_options_of_a_training_reach_its_batches(scenes_folder, tmp_path):
    from assemble import set_up, training_batches, update_shape
    from command_line.groups import grouped
    from distributed import Ranks
    from images.asked import data_to_train_on

    given = words(
        scenes_folder, tmp_path, "run", "--seed=5", "--accumulate=2", "--augment=crop", "--mixup=0.3", "--cutmix=0.7"
    )
    setup = set_up(grouped(parsing.parse(given)), Ranks())
    data = data_to_train_on(setup.asked, setup.ranks, setup.preprocess)
    batches = training_batches(setup, data, update_shape(setup))
    assert (batches.seed, batches.accumulate, batches.augment) == (5, 2, "crop")
    assert (batches.mixup, batches.cutmix) == (0.3, 0.7)


def test_a_compiler_that_fails_is_one_message(scenes_folder, tmp_path, run, monkeypatch):
    from torch._inductor.exc import InductorError

    monkeypatch.setattr(
        torch,
        "compile",
        lambda *_, **__: tiny.raising(InductorError(RuntimeError("No working C++ compiler found"), None)),
    )
    status, _, err = run(words(scenes_folder, tmp_path, "run", "--model=tiny_classifier", "--compile"))
    assert status == 1 and "--compile does not work here" in err and "No working C++ compiler" in err


def test_a_loss_that_is_not_finite_is_status_1_and_recorded(scenes_folder, tmp_path, run):
    more = ("--learning_rate=1e30", "--optimizer=SGD", "--warmup_epochs=0", "--epochs=3", "--model=tiny_classifier")
    status, _, err = run(words(scenes_folder, tmp_path, "run", *more))
    assert status == 1 and "not finite in epoch" in err and "update" in err and "Traceback" not in err
    assert "not finite" in read(tmp_path / "run", "failure.json")["reason"] and "--learning_rate" in err
    assert not (tmp_path / "run" / "result.json").exists()


# -------------------------------------------------------------------------------- prepare and the shell
def test_prepare_check_and_archive(scenes_folder, tmp_path, run):
    status, out, err = run(["prepare", "--check", f"--data_dir={scenes_folder}"])
    assert status == 0 and "sea" in out, err
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in scenes_folder.rglob("*.jpg"):
            archive.write(path, path.relative_to(scenes_folder))
    status, out, err = run(["prepare", f"--archive={tmp_path / 'images.zip'}", f"--data_dir={tmp_path / 'data'}"])
    assert status == 0 and len(list((tmp_path / "data").rglob("*.jpg"))) == 78, err


def test_as_a_program_it_exits_with_the_status_and_no_bar(tmp_path):
    status, _, err = tiny.finish(tiny.start(["--data_dir", tmp_path / "none"], cwd=tmp_path))
    assert status == 2 and err.startswith("error: no training images") and "%|" not in err
