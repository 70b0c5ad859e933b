"""What was measured is what is said: ratios, times, reasons and advice. Run it alone: pytest tests/test_measured.py"""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from test_report import compare, make_run
from tqdm.utils import disp_len

import main
from reports import page, pictures, results, tables
from runs import config
from system import waiting
from utils import UserError

CPU = torch.device("cpu")


def seeded(folder: Path, rates: dict[str, list[float]], **options) -> dict:
    """Return a comparison with these images/s for the runs of each precision, seed by seed."""
    runs = [
        make_run(folder / f"{name}-{seed}", name, seed=seed, rates=(1.0, rate), **options)
        for name, found in rates.items()
        for seed, rate in enumerate(found)
    ]
    return compare(*runs)[1]


def told(comparison: dict, folder: Path) -> list[str]:
    """Return the text of a comparison in a table, on the terminal, in its file and on its page."""
    page.html_comparison([], comparison, folder / "report.html")
    written = [tables.performance_table(comparison), tables.terminal_table(comparison), json.dumps(comparison)]
    return [*written, (folder / "report.html").read_text()]


def rewritten(run: Path, name: str = "result.json", **changes) -> Path:
    """Return a run with other entries in one of its files."""
    (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | changes))
    return run


# Ratios over seeds


@pytest.mark.usefixtures("drawn")
def test_one_fast_run_does_not_make_a_speed_up(tmp_path):
    comparison = seeded(tmp_path, {"fp32": [20.0, 155.0, 21.0], "amp-bf16": [40.0, 42.0, 41.0]})
    amp = comparison["rows"][1]
    assert amp["ratios"]["speed_up"]["values"] == pytest.approx([2.0, 42 / 155, 41 / 21])
    assert amp["speed_up"] is None, "seed by seed 0.27 to 2 times as fast is no gain"
    (sentence,) = comparison["remarks"]
    assert "No speed-up is stated for ResNet18 AMP bfloat16" in sentence and "0.27 to 2.00" in sentence
    for text in told(comparison, tmp_path):
        assert "unclear" in text and "0.27 to 2.00" in " ".join(text.split())
        assert not re.search(r"\d\.\d\d×.*\d\.\d\d×.*\n.*unclear.*2\.00×", text)


def test_a_speed_up_is_the_median_of_the_ratios_of_equal_seeds(tmp_path):
    # All runs of seed 1 met a machine half as fast: the ratio of the means would be 1.77.
    comparison = seeded(tmp_path, {"fp32": [100.0, 50.0, 100.0], "amp-bf16": [180.0, 100.0, 190.0]})
    assert comparison["rows"][1]["speed_up"] == pytest.approx(1.9) and comparison["remarks"] == []
    assert "| 180 (100–190) | 1.90× |" in tables.performance_table(comparison)
    assert max(map(disp_len, tables.terminal_table(comparison).splitlines())) <= 80


@pytest.mark.parametrize(
    ("fp32", "amp", "stated"),
    [
        ([100, 100], [99, 102], None),
        ([100, 100], [100, 100], 1.0),
        ([100, 100], [24, 25], 0.245),  # slower is stated as well as faster
        ([100], [50, 200], None),  # one seed in common shows no spread: each run against each
        ([100, 80], [200], 2.25),
    ],
)
def test_a_gain_smaller_than_its_spread_is_not_stated(tmp_path, fp32, amp, stated):
    assert seeded(tmp_path, {"fp32": fp32, "amp-bf16": amp})["rows"][1]["speed_up"] == (
        pytest.approx(stated) if stated else None
    )


def test_memory_that_varies_more_than_it_falls_gives_no_ratio(tmp_path):
    memory = {"fp32": (2000.0, 1500.0), "amp-bf16": (1500.0, 1900.0)}
    runs = [
        make_run(tmp_path / f"{name}{seed}", name, seed=seed, memory=value)
        for name, values in memory.items()
        for seed, value in enumerate(values)
    ]
    comparison = compare(*runs)[1]
    assert comparison["rows"][1]["memory_ratio"] is None and "No memory ratio" in comparison["remarks"][0]


def test_a_rate_of_testing_is_not_compared_with_one_of_training(tmp_path):
    tested = rewritten(make_run(tmp_path / "tested", "amp-bf16"), train_seconds=None, images_per_second=900.0)
    (tested / "metrics.jsonl").unlink()
    comparison = compare(make_run(tmp_path / "fp32"), tested)[1]
    assert comparison["rows"][1]["speed_up"] is None and "| – |" in tables.performance_table(comparison)


# A busy machine


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("busy_one", ["fp32", "amp-bf16"])
def test_no_speed_up_is_stated_of_a_busy_machine(tmp_path, busy_one):
    runs = [make_run(tmp_path / "fp32"), make_run(tmp_path / "amp-bf16", "amp-bf16", rates=(1.0, 25.0))]
    for run in runs:
        rewritten(run, busy_share=0.62 if run.name == busy_one else 0.004)
    comparison = compare(*runs)[1]
    amp = comparison["rows"][1]
    assert amp["speed_up"] is None and amp["ratios"]["speed_up"]["unstated"] == "busy" and amp["memory_ratio"] == 1
    for text in told(comparison, tmp_path):
        flat = " ".join(text.split())
        assert "The machine was busy: times are not comparable" in flat and "lost 62 %" in flat
        assert "0.23×" not in flat


def test_a_quiet_machine_and_an_old_result_are_not_called_busy(tmp_path):
    quiet = rewritten(make_run(tmp_path / "fp32"), busy_share=0.04)
    unknown = rewritten(make_run(tmp_path / "tf32", "tf32"), busy_share=None)
    old = make_run(tmp_path / "amp-bf16", "amp-bf16")
    comparison = compare(quiet, unknown, old)[1]
    assert [row["speed_up"] for row in comparison["rows"]] == [1, 1, 1] and comparison["remarks"] == []
    with pytest.raises(UserError, match="result.json"):
        results.read_run(rewritten(quiet, busy_share="much"))


def test_a_summary_says_that_the_machine_was_busy(tmp_path):
    run = results.read_run(rewritten(make_run(tmp_path / "run"), busy_share=0.4))
    assert re.search(r"^Machine busy +40 %", tables.summary(run["result"]), re.MULTILINE)
    assert results.busy_share([{"busy_share": 0.5, "seconds": 1.0}, {"busy_share": 0.1, "seconds": 3.0}]) == 0.2
    assert results.busy_share([{"busy_share": None, "seconds": 1.0}, {"seconds": 1.0}]) is None


COUNTS = {"clock": 100.0, "waited": {"1": 5.0}, "own": 50.0, "workers": 0.0, "stolen": 0.0}


@pytest.mark.parametrize(
    ("later", "share"),
    [
        ({"waited": {"1": 5.0}, "own": 70.0}, 0.0),  # idle processors, as while a GPU computes
        ({"waited": {"1": 9.0}, "own": 56.0}, 0.4),
        ({"waited": {"1": 5.1, "2": 3.0}, "own": 56.0}, 0.3),  # a thread that is new and waited longest
        ({"waited": {"1": 9.0}, "own": 70.0}, 0.0),  # more threads than processors: it had all of them
        ({"waited": {"1": 9.0}, "own": 56.0, "workers": 3.0}, 0.1),  # its own loading workers took three
        ({"waited": {"1": 5.0}, "own": 60.0, "stolen": 2.0}, 0.2),  # by the host of a virtual machine
        ({"waited": {}, "own": 56.0}, None),  # not Linux
    ],
)
def test_only_what_others_took_counts_as_busy(monkeypatch, later, share):
    states = iter([waiting._Counts(**COUNTS), waiting._Counts(**COUNTS | {"clock": 110.0} | later)])
    monkeypatch.setattr(waiting, "_counts", lambda root: next(states))
    monkeypatch.setattr(waiting, "_processors", lambda root: 2.0)
    assert waiting.Waiting().share() == (None if share is None else pytest.approx(share))


# The choice of the epoch


def validated(run: Path, best: int, accuracies: list[float]) -> Path:
    """Return the run with these validation accuracies, tested at the epoch `best`."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"val_acc": value} for line, value in zip(lines, accuracies, strict=True)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rewritten(run, best_epoch=best)


TRUTH = [0] * 20


@pytest.mark.parametrize(
    ("wrong", "best", "accuracies", "said"),
    [
        (8, 1, [50.0, 50.0, 50.0, 50.0], "comes from the choice of the epoch"),
        (8, 3, [50.0, 50.0, 50.0, 40.0], "comes from the choice of the epoch"),  # 10 points there, 40 in the test
        (8, 1, [20.0, 20.0, 20.0, 20.0], "20.00 % and 50.00 %."),  # it is not the epoch alone
        (8, 4, [50.0, 50.0, 50.0, 50.0], None),  # tested at the same epoch
        (8, 3, [50.0, 50.0, 50.0, 10.0], None),
        (0, 3, [50.0, 50.0, 50.0, 50.0], None),  # no difference to explain
    ],
)
def test_a_difference_that_comes_from_the_choice_of_the_epoch_is_said(tmp_path, wrong, best, accuracies, said):
    fp32 = validated(make_run(tmp_path / "fp32", truth=TRUTH), 4, [50.0] * 4)
    amp = make_run(tmp_path / "amp", "amp-bf16", truth=TRUTH, predicted=[1] * wrong + TRUTH[wrong:])
    comparison = compare(fp32, validated(amp, best, accuracies))[1]
    found = [text for text in comparison["remarks"] if "was tested at epoch" in text]
    if said is None:
        assert found == []
        return
    (sentence,) = found
    assert f"AMP bfloat16 was tested at epoch {best}, ResNet18 FP32 at epoch 4" in sentence and said in sentence
    assert "At epoch 4" in sentence and sentence in " ".join(tables.terminal_table(comparison).split())
    assert ("comes from" in sentence) == ("comes from" in said)


def test_seeds_are_set_against_equal_seeds_when_epochs_were_chosen(tmp_path):
    runs = []
    for seed, best in enumerate((4, 1)):
        runs.append(validated(make_run(tmp_path / f"fp32{seed}", truth=TRUTH, seed=seed), best, [50.0] * 4))
        amp = make_run(tmp_path / f"amp{seed}", "amp-bf16", truth=TRUTH, predicted=[1] * 8 + TRUTH[8:], seed=seed)
        runs.append(validated(amp, 1, [50.0] * 4))
    (sentence,) = [text for text in compare(*runs)[1]["remarks"] if "tested at" in text]
    assert "(seed 0)" in sentence


# Other data


def listed(run: Path, labels: dict[str, str], fingerprint: str) -> Path:
    (run / "split.csv").write_text(
        "path,class,part\n" + "".join(f"{path},{name},train\n" for path, name in labels.items())
    )
    dataset = tiny.config(run)["dataset"]
    return rewritten(run, "config.json", dataset=dataset | {"fingerprint": fingerprint})


@pytest.mark.parametrize(
    ("labels", "fingerprint", "said"),
    [
        ({"1.png": "sea", "2.png": "forest"}, "f", "1 of 2 images have another label"),
        ({"1.png": "sea", "2.png": "sea"}, "f", ""),
        ({"1.png": "sea", "3.png": "sea"}, "g", "2 images are in one of them only"),
        ({"1.png": "sea", "2.png": "sea"}, "g", "the images or their labels are others"),
    ],
)
def test_runs_on_other_images_or_labels_are_told_apart(tmp_path, labels, fingerprint, said):
    one = listed(make_run(tmp_path / "fp32"), {"1.png": "sea", "2.png": "sea"}, "f")
    other = listed(make_run(tmp_path / "amp", "amp-bf16"), labels, fingerprint)
    comparison = compare(one, other)[1]
    assert len(comparison["remarks"]) == bool(said)
    if said:
        sentence = f"amp and fp32 were not made of the same data: {said}."
        assert sentence in comparison["remarks"][0] and sentence in tables.performance_table(comparison)
    other_size = make_run(tmp_path / "tf32", "tf32", image_size=32)
    assert len(compare(one, listed(other_size, {"1.png": "sea", "2.png": "sea"}, "h"))[1]["remarks"]) == 0


def test_a_test_on_a_part_of_the_images_says_so(tmp_path):
    one = make_run(tmp_path / "fp32")
    other = make_run(tmp_path / "amp", "amp-bf16")
    table = (other / "predictions.csv").read_text()
    (other / "predictions.csv").write_text(table.replace("sea/9.jpg,sea", "sea/9.jpg,forest"))
    sentence = tables.verdict(compare(one, other)[1])
    assert "0 lost of 9 that both tested under one label, exact McNemar test" in sentence


# Pictures drawn again


@pytest.mark.usefixtures("drawn")
def test_a_report_from_another_folder_does_not_lose_the_mistakes(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", predicted=[1, 1, 0, 1, 1, 1, 2, 2, 2, 2], data_dir="photos")
    photos = tmp_path / "photos"
    for place in (0, 1):
        (photos / "buildings").mkdir(parents=True, exist_ok=True)
        tiny.noise().save(photos / "buildings" / f"{place}.jpg")
    rewritten(run, "config.json", dataset=tiny.config(run)["dataset"] | {"folder": str(photos)})
    for owner, names in ((pictures, ("learning_curve", "confusion_matrix")), (page, ("html_report",))):
        for name in names:
            monkeypatch.setattr(owner, name, lambda *_, **__: None)
    monkeypatch.setattr(
        pictures, "labelled_sheet", lambda files, _, path, **__: path.write_text(f"{sum(map(Path.exists, files))}")
    )
    redraw = ["report", f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run"]
    monkeypatch.chdir("/")  # "photos" is not here
    assert main.main(redraw) == 0 and (run / "mistakes.png").read_text() == "2"
    assert "mistakes" not in capsys.readouterr().out
    for gone, words in (("1.jpg", "1 of its 2 images are"), ("0.jpg", "2 of its 2 images are")):
        (photos / "buildings" / gone).unlink()
        assert main.main(redraw) == 0 and (run / "mistakes.png").read_text() == "2"
        assert f"mistakes.png stays as it is: {words} not in {photos}" in capsys.readouterr().out
    (run / "mistakes.png").unlink()
    assert main.main(redraw) == 0 and (run / "mistakes.png").read_text() == "0"
    assert "shows empty places" in capsys.readouterr().out


# Versions


def test_a_run_names_the_packages_that_its_network_and_split_come_from(monkeypatch):
    monkeypatch.setattr(config, "version", lambda name: f"version of {name}")
    assert config.versions("ResNet18")["scikit-learn"] == "version of scikit-learn"
    assert "timm" not in config.versions("ResNet18")
    assert config.versions("timm:resnet18")["timm"] == "version of timm"


def test_runs_of_other_versions_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "fp32"), make_run(tmp_path / "amp", "amp-bf16")]
    for run, versions in zip(runs, ({"torch": "2.11.0"}, {"torch": "2.14.1", "timm": "1.0"}), strict=True):
        rewritten(run, "config.json", versions=versions)
    comparison = compare(*runs)[1]
    assert list(comparison["differences"]) == ["version of torch"], "what one run did not record is not known to differ"
    assert "Beware: the runs also differ in version of torch (2.11.0, 2.14.1)." in tables.conditions(comparison)


def test_a_comparison_that_recorded_nothing_says_no_empty_sentence(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "failure.json").write_text(json.dumps({"precision": "fp32", "reason": "exit status 2"}))
    comparison = compare(tmp_path / "a")[1]
    assert all(len(line) > 1 for line in tables.conditions(comparison))
