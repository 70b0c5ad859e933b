"""Reports from synthetic run folders with known numbers: tables, tests, calibration, pictures, HTML.

The numbers are checked by hand or against a closed form. Run it alone: pytest tests/test_report.py
"""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm.utils import disp_len

from option import MAY_DIFFER_IN_COMPARISON
from reports import answer, page, pictures, results, sheets, tables
from reports import text as layout
from runs.result import confusion_cells
from system.files import write_text
from utils import UserError

pytestmark = pytest.mark.usefixtures("drawn")
CLASSES = ["buildings", "forest", "sea"]
HOSTILE = ["a|b", "<script>alert(1)</script>", "$\\frac{$", 'new\nline, "quoted"', "\x1b[31mred\u202e", "海" * 40]


def make_run(
    directory: Path,
    precision: str = "fp32",
    *,
    truth=None,
    predicted=None,
    classes=CLASSES,
    seed: int = 42,
    rates=(50.0, 100.0, 120.0, 110.0),
    memory: float = 2000.0,
    seconds: float = 60.0,
    device: str = "cpu",
    scales=None,
    device_name: str = "a processor",
    **options,
) -> Path:
    """Return a finished run's folder; the classifier predicts with a probability of 0.8."""
    truth = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2] if truth is None else truth)
    predicted = truth if predicted is None else np.array(predicted)
    directory.mkdir(parents=True)
    number = len(classes)
    machine = {"precision": precision, "device": device, "device_name": device_name}
    asked = {"model": "ResNet18", "epochs": len(rates), "batch_size": 8, "image_size": 64, "seed": seed}
    asked |= {"amp": precision.startswith("amp"), "data_dir": str(directory), **options}
    dataset = {"fingerprint": "f", "classes": classes, "train": 80, "val": 20, "test": len(truth)}
    config = {"options": asked, "versions": {"torch": "2.11.0"}, **machine, "dataset": dataset}
    (directory / "config.json").write_text(json.dumps(config))
    metrics = [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "train_acc": 60.0,
            "val_loss": 1.1 / epoch,
            "val_acc": 50.0 + epoch,
            "learning_rate": 1e-4,
            "loss_scale": scale,
            "skipped_updates": scale == 1024,
            "images_per_second": rate,
            "data_wait_share": 0.1,
            "seconds": 10.0,
            "peak_memory_mb": memory,
            "elapsed": 12.0 * epoch,
            "skips": [],
        }
        for epoch, (rate, scale) in enumerate(zip(rates, scales or [None] * len(rates), strict=True), 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in metrics))
    confusion = np.zeros((number, number), dtype=int)
    np.add.at(confusion, (truth, predicted), 1)
    hits, named, true = np.diag(confusion), confusion.sum(0), confusion.sum(1)
    shares = hits / np.maximum(named, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(named + true, 1)
    names = ("precision", "recall", "f1", "support")
    result = {
        "test_acc": 100 * float((truth == predicted).mean()),
        "balanced_acc": 100 * float(shares[1].mean()),
        "macro": dict(zip(names, map(float, map(np.mean, shares)), strict=False)),
        "test_loss": 0.5,
        "best_epoch": len(rates),
        "best_val_acc": 50.0 + len(rates),
        "total_seconds": seconds * 1.5,
        "train_seconds": seconds,
        "images_per_second": float(np.median(rates[1:] or rates)),
        **machine,
        "peak_memory_mb": memory,
        "reserved_memory_mb": None,
        "calibration_error": 0.1,
        "classes": classes,
        "memory_kind": "CUDA allocated" if device == "cuda" else "process resident peak",
        "per_class": {
            name: dict(zip(names, row.tolist(), strict=True))
            for name, row in zip(classes, np.array([*shares, true]).T, strict=True)
        },
        "confusion": confusion.tolist(),
    }
    (directory / "result.json").write_text(json.dumps(result))
    with open(directory / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "predicted", "confidence", *classes])
        for place, (true, guess) in enumerate(zip(truth, predicted, strict=True)):
            shares = np.full(number, 0.2 / (number - 1))
            shares[guess] = 0.8
            writer.writerow([f"{classes[true]}/{place}.jpg", classes[true], classes[guess], 0.8, *shares])
    return directory


def fail_run(directory: Path, precision: str, reason: str) -> Path:
    directory.mkdir(parents=True)
    (directory / "failure.json").write_text(json.dumps({"precision": precision, "reason": reason}))
    return directory


def compare(*directories: Path) -> tuple[list[dict], dict]:
    runs = [results.read_run(directory) for directory in directories]
    comparison = results.compare_runs(runs, MAY_DIFFER_IN_COMPARISON)
    json.dumps(comparison, allow_nan=False)  # comparison.json must be plain JSON
    return runs, comparison


def is_picture(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert np.asarray(image.convert("L")).std() > 1
        return image.size


# Reading


def test_read_run(tmp_path):
    run = results.read_run(make_run(tmp_path / "baseline"))
    assert run["directory"].name == "baseline" and run["result"]["test_acc"] == 100 and run["failure"] is None
    assert (run["label"], run["precision"], run["seed"]) == ("ResNet18 FP32", "fp32", 42)
    assert [epoch["epoch"] for epoch in run["metrics"]] == [1, 2, 3, 4]


DAMAGE = {
    "config.json": (None, "{", "[]", '{"options": 1}', '{"options": {"seed": [1]}, "precision": "fp32"}', 10**5 * "["),
    "metrics.jsonl": (
        *(None, '{"epoch": 1}\n{"epo', '{"loss": 1}\n', "[1]\n", '{"epoch": Infinity}'),
        '{"epoch": 1, "elapsed": "x"}',
    ),
    "result.json": ("{}", "\x00", "null"),
}
SENSELESS = [
    *({"confusion": [[1, 2]]}, {"confusion": [[0] * 3] * 3}, {"confusion": None}, {"confusion": [[math.inf] * 3] * 3}),
    *({"test_acc": "high"}, {"classes": 3}, {"peak_memory_mb": None}, {"per_class": {}}, {"per_class": []}),
]


@pytest.mark.parametrize("name", DAMAGE)
def test_missing_or_damaged_files_are_named(tmp_path, name):
    file = make_run(tmp_path / "run") / name
    whole = file.read_text()
    senseless = [json.dumps(json.loads(whole) | change) for change in SENSELESS] if name == "result.json" else []
    for content in (*DAMAGE[name], *senseless):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=re.escape(name)):
            results.read_run(file.parent)


def test_an_unfinished_run_has_no_result(tmp_path):
    directory = make_run(tmp_path / "run")
    (directory / "result.json").unlink()
    assert results.read_run(directory)["result"] is None and len(results.read_run(directory)["metrics"]) == 4
    (directory / "metrics.jsonl").unlink()
    assert results.read_run(directory)["metrics"] == []


@pytest.mark.parametrize("row", ["0.8,0.1,0.1", "high,0.1,0.1,0.8", "nan,0.1,0.1,0.8"])
def test_damaged_predictions_are_named(tmp_path, row):
    file = make_run(tmp_path / "run") / "predictions.csv"
    whole = file.read_text()
    for content in (f"{whole}a.jpg,sea,sea,{row}\n", "", "path,label\n"):
        file.write_text(content)
        with pytest.raises(UserError, match="predictions.csv"):
            results.read_predictions(file)


def test_writing_replaces_whole_files_and_leaves_nothing_behind(tmp_path):
    write_text(tmp_path / "a", "first")
    write_text(tmp_path / "a", "second\udce9")  # of an undecodable file name
    assert (tmp_path / "a").read_bytes() == b"second\xe9" and [file.name for file in tmp_path.iterdir()] == ["a"]
    with pytest.raises(UserError, match="nowhere/a cannot be written"):
        write_text(tmp_path / "nowhere" / "a", "first")


# Numbers


def test_memory_that_is_not_known_gives_no_ratio(tmp_path):
    _, comparison = compare(make_run(tmp_path / "a", memory=0.0), make_run(tmp_path / "b", "amp-bf16", memory=0.0))
    assert [row["memory_ratio"] for row in comparison["rows"]] == [None, None] and comparison["rows"][1]["speed_up"]


def test_intervals_and_tests_are_those_of_scipy():
    from scipy import stats

    for right, total in ((0, 1), (1, 1), (45, 50), (2817, 3000)):
        interval = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
        assert results.wilson(right, total) == pytest.approx((100 * interval.low, 100 * interval.high))
    for lost, gained in ((0, 0), (0, 1), (3, 3), (8, 1), (33, 46), (2, 60), (7000, 7200)):
        expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1
        assert results.sign_test(lost, gained) == results.sign_test(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_calibration_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.5, 0.5]])
    right = probabilities.argmax(1) == [0, 1, 1, 0]
    found = results.calibration(probabilities.max(1), right, bins=2)
    # (0, 0.5] holds the last image (right, 0.5); (0.5, 1] holds 0.9 right, 0.8 wrong, 0.6 right.
    assert found["count"].tolist() == [1, 3]
    np.testing.assert_allclose([found["accuracy"], found["confidence"]], [[1, 2 / 3], [0.5, 2.3 / 3]])
    assert found["ece"] == pytest.approx(0.25 * 0.5 + 0.75 * (2.3 / 3 - 2 / 3))
    assert results.calibration(np.full(400, 0.75), np.arange(400) % 4 != 0)["ece"] == pytest.approx(0)
    sure = results.calibration(np.ones(2), np.array([True, True]))
    assert sure["count"][-1] == 2 and np.isnan(sure["accuracy"][0])


def test_steady_rate_leaves_the_first_epoch_out():
    rates = [{"images_per_second": rate} for rate in (1.0, 90.0, 110.0)]
    assert results.steady_rate(rates) == 100 and results.steady_rate(rates[:1]) == 1


def test_mcnemar_by_hand(tmp_path):
    truth = [0] * 20
    first = make_run(tmp_path / "a", truth=truth, predicted=[1] * 1 + [0] * 19)
    second = make_run(tmp_path / "b", truth=truth, predicted=[0] * 12 + [1] * 8)
    found = results.mcnemar(first / "predictions.csv", second / "predictions.csv")
    # 8 images are right only in the first, 1 only in the second: 2 (C(9,0) + C(9,1)) / 2^9.
    assert (found["lost"], found["gained"], found["images"]) == (8, 1, 20)
    assert found["p_value"] == pytest.approx(2 * (1 + 9) / 2**9)


def test_mcnemar_matches_by_path_not_by_order(tmp_path):
    first, second = (
        make_run(tmp_path / name, predicted=[1, 0, 0, 1, 1, 1, 2, 2, 2, 2]) / "predictions.csv" for name in "ab"
    )
    header, *rows = second.read_text().splitlines()
    second.write_text("\n".join([header, *rows[::-1][:9]]) + "\n")
    found = results.mcnemar(first, second)
    assert (found["images"], found["p_value"], found["lost"]) == (9, 1.0, 0)
    second.unlink()
    assert results.mcnemar(first, second) is None


# Comparison


def test_training_memory_stands_beside_the_peak_of_the_process(tmp_path):
    folders = [make_run(tmp_path / "fp32"), make_run(tmp_path / "amp", "amp-bf16"), make_run(tmp_path / "old", "tf32")]
    for folder, taken in zip(folders, (1200.0, 700.0), strict=False):  # the third was written by an earlier version
        result = json.loads((folder / "result.json").read_text()) | {"training_memory_mb": taken}
        (folder / "result.json").write_text(json.dumps(result))
    _, comparison = compare(*folders)
    ratios = {row["precision"]: row["training_memory_ratio"] for row in comparison["rows"]}
    assert ratios == {"fp32": 1, "tf32": None, "amp-bf16": pytest.approx(700 / 1200)}
    assert {row["memory_ratio"] for row in comparison["rows"]} == {1}
    said = "took 1,200 MB (ResNet18 FP32), 700 MB (ResNet18 AMP bfloat16, 0.58× FP32)."
    assert comparison["remarks"][-1].endswith(said)
    header, lines = tables.table_cells(comparison)
    assert [line[header.index("Training memory")] for line in lines] == ["1200 MB", "–", "700 MB"]


def test_comparison_of_two_precisions(tmp_path):
    truth = [0, 1] * 50
    _, comparison = compare(
        make_run(
            tmp_path / "amp",
            "amp-bf16",
            truth=truth,
            predicted=[1, 1, 1] + truth[3:],
            memory=1500.0,
            rates=(1.0, 300.0, 200.0, 220.0),
            seconds=30.0,
        ),
        make_run(tmp_path / "fp32", truth=truth),
    )
    base, amp = comparison["rows"]
    assert (base["precision"], amp["precision"]) == ("fp32", "amp-bf16")
    assert base["speed_up"] == 1 and amp["speed_up"] == pytest.approx(220 / 110) and amp["memory_ratio"] == 0.75
    assert amp["test_acc"] == {"mean": 98.0, "median": 98.0, "std": None, "interval": None, "values": [98.0]}
    assert amp["difference"] == {
        "points": -2,
        "p_value": 0.5,
        "test": "0 images gained, 2 lost of 100, exact McNemar test",
        "images": 100,
    }
    table = tables.performance_table(comparison)
    assert (
        "| Algorithm | Test Accuracy | Memory (process resident peak) | Total Training Time | Images/s | Speed-up "
        "| Memory ratio | Time without evaluation |"
    ) in table
    assert "| ResNet18 AMP bfloat16 | 98.00 % | 1500 MB | 45.0 s | 220 | 2.00× | 0.75× | 30.0 s |" in table
    assert "p = 0.5: not distinguishable from noise" in table and "torch 2.11.0" in table


def test_the_level_is_shared_by_several_comparisons(tmp_path):
    truth = [0] * 40  # six lost images: p = 2 / 2^6 = 0.031, real alone but not among three comparisons
    base = make_run(tmp_path / "fp32", truth=truth)
    amp = make_run(tmp_path / "amp", "amp-bf16", truth=truth, predicted=[1] * 6 + [0] * 34)
    alone = compare(base, amp)[1]
    assert alone["rows"][1]["difference"]["p_value"] == pytest.approx(2 / 2**6)
    assert "p = 0.031: distinguishable from noise" in tables.verdict(alone)
    sentence = tables.verdict(
        compare(base, amp, *(make_run(tmp_path / n, n, truth=truth) for n in ("tf32", "amp-fp16")))[1]
    )
    assert "p = 0.031: not distinguishable from noise" in sentence and "shared by 3 tests" in sentence
    assert sentence.endswith(".") and ". " not in sentence
    far = make_run(tmp_path / "far", "amp-fp16", truth=truth, predicted=[1] * 12 + [0] * 28)
    sentence = tables.verdict(compare(base, far)[1])
    assert "at a level of 5 %:" in sentence and "p < 0.001: distinguishable from noise" in sentence


def test_seeds_are_averaged_and_compared_by_their_spread(tmp_path):
    from scipy import stats

    truth = [0] * 100
    wrong = {"fp32": (10, 12, 14), "amp-bf16": (11, 12, 16)}
    runs, comparison = compare(
        *(
            make_run(
                tmp_path / f"{name}-{seed}", name, truth=truth, predicted=[1] * count + [0] * (100 - count), seed=seed
            )
            for name, counts in wrong.items()
            for seed, count in enumerate(counts)
        )
    )
    base, amp = comparison["rows"]
    assert base["test_acc"]["mean"] == 88 and base["test_acc"]["std"] == pytest.approx(2)
    assert base["seeds"] == [0, 1, 2]
    expected = stats.ttest_ind([90, 88, 86], [89, 88, 84], equal_var=False).pvalue
    assert amp["difference"]["p_value"] == pytest.approx(expected)
    table = tables.performance_table(comparison)
    assert "88.00 ± 2.00 %" in table and "Welch" in table and "over seeds" in table
    low, high = stats.t.interval(0.95, 2, loc=88, scale=stats.sem([90, 88, 86]))
    assert base["test_acc"]["interval"] == pytest.approx((high - low) / 2) == pytest.approx(4.97, abs=0.005)
    assert "FP32 88.00 ± 4.97 %, ResNet18 AMP bfloat16 87.00 ± 6.57 %" in table
    assert "88.00 ± 4.97 %" in tables.terminal_table(comparison)
    pictures.comparison_picture(runs, comparison, tmp_path / "comparison.png")
    is_picture(tmp_path / "comparison.png")


def test_seeds_without_any_spread_cannot_be_tested(tmp_path):
    _, comparison = compare(
        *(make_run(tmp_path / f"{name}-{seed}", name, seed=seed) for name in ("fp32", "amp-bf16") for seed in (1, 2))
    )
    assert "+0.00 points (could not be tested)" in tables.verdict(comparison)


def test_layers_in_float32_have_a_row_of_their_own(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "amp-bf16")
    make_run(tmp_path / "c", "amp-bf16", float32_layers="head")
    rows = compare(*(tmp_path / name for name in "abc"))[1]["rows"]
    labels = ["ResNet18 FP32", "ResNet18 AMP bfloat16", "ResNet18 AMP bfloat16, head in FP32"]
    assert [row["label"] for row in rows] == labels and all(row["against"] == labels[0] for row in rows)


def test_failed_and_unfinished_runs_stand_in_the_table_with_their_reason(tmp_path):
    unfinished = make_run(tmp_path / "amp-bf16", "amp-bf16")
    (unfinished / "result.json").unlink()
    runs, comparison = compare(
        make_run(tmp_path / "fp32"), unfinished, fail_run(tmp_path / "amp-fp16", "amp-fp16", "loss is nan | epoch 2")
    )
    table = tables.performance_table(comparison)
    assert "| ResNet18 AMP float16 | failed: loss is nan \\| epoch 2 |" in table
    assert "| ResNet18 AMP bfloat16 | not finished: 4 of 4 epochs done |" in table
    assert "nothing can be said about accuracy" in table
    assert [row["speed_up"] for row in comparison["rows"]] == [1, None, None]


def test_without_fp32_and_without_any_finished_run(tmp_path):
    runs, comparison = compare(make_run(tmp_path / "amp", "amp-bf16"))
    assert comparison["rows"][0]["speed_up"] is None and "–" in tables.performance_table(comparison)
    runs, comparison = compare(fail_run(tmp_path / "a", "fp32", "out of memory"))
    assert "failed: out of memory" in tables.performance_table(comparison)
    pictures.comparison_picture(runs, comparison, tmp_path / "comparison.png")
    page.html_comparison([], comparison, tmp_path / "report.html")
    assert "out of memory" in (tmp_path / "report.html").read_text()
    assert tables.performance_table(results.compare_runs([]))


def test_runs_of_two_machines_are_not_averaged(tmp_path):
    _, comparison = compare(
        make_run(tmp_path / "a", device="cuda", device_name="RTX"),
        make_run(tmp_path / "b", rates=(1.0, 50.0)),
        make_run(tmp_path / "c", "amp-fp16", device="cuda", device_name="RTX", rates=(1.0, 330.0)),
    )
    assert [row["label"] for row in comparison["rows"]] == [
        "ResNet18 FP32, RTX",
        "ResNet18 AMP float16, RTX",
        "ResNet18 FP32, a processor",
    ]
    assert [row["speed_up"] for row in comparison["rows"]] == [1, 3, 1]
    assert "| Memory (CUDA allocated or process resident peak) |" in tables.performance_table(comparison)


def test_runs_of_one_precision_and_seed_are_not_averaged(tmp_path):
    _, comparison = compare(make_run(tmp_path / "a"), make_run(tmp_path / "b"), make_run(tmp_path / "c", seed=1))
    labels = [row["label"] for row in comparison["rows"]]
    assert labels == [f"ResNet18 FP32 ({tmp_path / name})" for name in "abc"]


def test_unequal_options_are_pointed_out(tmp_path):
    _, comparison = compare(
        make_run(tmp_path / "a", device="cuda", learning_rate=0.1, num_workers=0),
        make_run(tmp_path / "b", "amp-bf16", device="cuda", learning_rate=0.2, num_workers=4),
    )
    table = tables.performance_table(comparison)
    assert "Beware: the runs also differ in learning\\_rate (0.1, 0.2)." in table
    assert "GPU Memory (peak allocated)" in table
    assert list(comparison["differences"]) == ["learning_rate"]


# Text


def test_summary_fits_and_tells_everything(tmp_path):
    truth = list(range(6)) * 10
    run = results.read_run(
        make_run(tmp_path / "run", "amp-fp16", classes=HOSTILE, truth=truth, predicted=[0] * 3 + truth[3:])
    )
    text = tables.summary(run["result"])
    assert max(map(disp_len, text.splitlines())) <= 80
    assert "96.67 %" in text and "58 of 60" in text and "process resident peak" in text and "\x1b" not in text
    assert re.search(r"a\|b +83\.33 +100\.00 +90\.91 +10$", text, re.MULTILINE)
    assert len(text.splitlines()) == 6 + 2 + 7


def test_summary_of_many_classes_shows_the_weakest(tmp_path):
    truth = np.arange(50)
    run = results.read_run(
        make_run(
            tmp_path / "run",
            classes=[f"class {place}" for place in truth],
            truth=truth,
            predicted=np.where(truth == 37, 0, truth),
        )
    )
    text = tables.summary(run["result"])
    assert "class 37 " in text and "class 49" not in text and "30 of 50" in text


@pytest.mark.parametrize("name", ["a processor", "NVIDIA Quadro RTX 8000 with Max-Q Design, the second of two"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_terminal_table_fits_80_columns(tmp_path, name, seeds):
    found = [
        make_run(
            tmp_path / f"{precision}-{seed}",
            precision,
            seed=seed,
            memory=12345.6 + seed,
            seconds=1e4 + seed,
            rates=[1.0, 1234.5 + seed],
            device_name=name if precision == "fp32" else "a processor",
        )
        for precision in ("fp32", "tf32", "amp-fp16")
        for seed in range(seeds)
    ]
    _, comparison = compare(*found, fail_run(tmp_path / "x", "amp-bf16", "out of memory " * 20))
    text = tables.terminal_table(comparison)
    assert max(map(disp_len, text.splitlines())) <= 80
    for part in ("100.00", "1,23", "12346" if seeds == 1 else "12347", "failed: out of memory", "TF32"):
        assert part in text


def test_fit_and_markdown():
    assert layout.fit("a\nb\x1b[0m", 80) == "a\\nb\\x1b[0m"
    assert layout.fit("abcdef", 4) == "abc…" and layout.fit("海海海", 5) == "海海…"
    assert layout.markdown("a|b<c>$d_e") == "a\\|b&lt;c&gt;\\$d\\_e"


# Pictures


def test_confusion_matrix_writes_counts_and_row_percentages(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    texts = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **options: texts.append((x, y, text)))
    pictures.confusion_matrix(np.array([[0, 0, 3], [0, 1, 1], [1, 1, 500]]), ["a", "b"], tmp_path / "a.png", title="t")
    assert set(texts) == {(0, 0, "3\n75 %"), (1, 0, "1\n25 %"), (0, 1, "0"), (1, 1, "500\n100 %")}


def test_gallery_shows_the_surest_mistakes_first(tmp_path, monkeypatch):
    with open(tmp_path / "predictions.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["path", "label", "predicted", "confidence", "a", "b"],
                ["right.png", "a", "a", 1.0, 1.0, 0.0],
                ["less.png", "a", "b", 0.6, 0.4, 0.6],
                ["missing.png", "a", "b", 0.9, 0.1, 0.9],
                ["broken.png", "b", "a", 0.7, 0.7, 0.3],
                ["least.png", "b", "a", 0.51, 0.51, 0.49],
            ]
        )
    Image.new("L", (30, 50), 200).save(tmp_path / "less.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    asked = []
    original = sheets.load_picture
    monkeypatch.setattr(sheets, "load_picture", lambda path, *more: (asked.append(path.name), original(path, *more))[1])
    pictures.gallery(tmp_path / "predictions.csv", tmp_path, tmp_path / "a.png", count=3)
    assert asked == ["missing.png", "broken.png", "less.png"]
    is_picture(tmp_path / "a.png")


# HTML


def body_of(path: Path) -> str:
    """Return the page; fail if it would load or run anything, or leave a tag open."""
    from html.parser import HTMLParser

    text = path.read_text(encoding="utf-8")
    opened = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("script", "link", "iframe", "object")
            assert all(name != "href" and not name.startswith("on") for name, _ in attributes)
            assert all(value.startswith("data:image/") for name, value in attributes if name == "src")
            if tag not in ("meta", "img"):
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Checker().feed(text)
    assert not opened and "url(" not in text and "@import" not in text
    return text


def draw(directory: Path) -> None:
    """Return the pictures in a run's folder."""
    run = results.read_run(directory)
    result = run["result"]
    best = result["best_epoch"]
    pictures.learning_curve(run["metrics"], directory / "learning_curve.png", title="t", best_epoch=best)
    pictures.confusion_matrix(confusion_cells(result), result["classes"], directory / "confusion_matrix.png", title="t")
    pictures.gallery(directory / "predictions.csv", directory, directory / "mistakes.png")


def test_html_report_is_self_contained_and_escapes(tmp_path):
    truth = list(range(6)) * 3
    run = make_run(
        tmp_path / "run<b>",
        "amp-fp16",
        classes=HOSTILE,
        truth=truth,
        predicted=[1, *truth[1:]],
        scales=[2.0, 1.0, 2.0, 2.0],
        model="<img src=x onerror=alert(1)>",
    )
    draw(run)
    page.html_report(run, tmp_path / "report.html")
    text = body_of(tmp_path / "report.html")
    assert "&lt;script&gt;alert(1)" in text and text.count('src="data:image/') == 3 + 1 + 2
    assert "94.44 %" in text and "image_size" in text and "AMP float16" in text
    with pytest.raises(UserError, match="nowhere"):
        page.html_report(tmp_path / "nowhere", tmp_path / "b.html")


def test_html_comparison(tmp_path):
    runs, comparison = compare(
        make_run(tmp_path / "fp32"),
        make_run(tmp_path / "amp-bf16", "amp-bf16"),
        fail_run(tmp_path / "amp-fp16", "amp-fp16", "out of memory"),
    )
    draw(tmp_path / "fp32")
    pictures.comparison_picture(runs, comparison, tmp_path / "comparison.png")
    page.html_comparison(runs, comparison, tmp_path / "report.html")
    text = body_of(tmp_path / "report.html")
    assert text.count('src="data:image/') == 4 + 2 * 3 + 2 and "failed: out of memory" in text
    assert "<h1>ResNet18: FP32, AMP float16, AMP bfloat16</h1>" in text and "<h2>AMP bfloat16</h2>" in text
    assert text.index(answer.advice(comparison)) < text.index("<img") < text.index("<table")
    assert "<td>AMP bfloat16</td>" in text and tables.verdict(comparison) in text


LONG = "timm:a_name_of_a_model_that_is_longer_than_every_column_of_every_table"
ANSWERS = {  # images/s, memory and wrong images of AMP beside 100, 1000 and 0 of FP32, and the end of the answer
    (137.0, 970.0, 0): "1.37× as fast as FP32, 3 % less memory than FP32, no difference in accuracy that 40 images "
    "could show. Use AMP bfloat16.",
    (137.0, 970.0, 1): "could show. Use AMP bfloat16; more seeds (--seeds 3) would say if its accuracy differs.",
    (137.0, 970.0, 20): "-50.00 points in accuracy, more than chance explains. Stay with FP32: AMP bfloat16 is less "
    "accurate by 50.00 points, more than chance explains.",
    (101.0, 1010.0, 0): "1 % more memory than FP32, no difference in accuracy that 40 images could show. Stay with "
    "FP32: AMP bfloat16 gains less than 5 % here.",
}


@pytest.mark.parametrize("measured", ANSWERS)
def test_a_comparison_is_answered_in_one_sentence(tmp_path, measured):
    rate, memory, wrong = measured
    truth = [0] * 40
    predicted = [1] * wrong + [0] * (40 - wrong)
    _, comparison = compare(
        make_run(tmp_path / "a", truth=truth, predicted=truth, rates=(1.0, 100.0), memory=1000.0, model=LONG),
        make_run(
            tmp_path / "b", "amp-bf16", truth=truth, predicted=predicted, rates=(1.0, rate), memory=memory, model=LONG
        ),
    )
    found = answer.in_one_sentence(comparison)
    assert found.startswith("AMP bfloat16: ") and found.endswith(ANSWERS[measured])
    assert answer.short_labels(comparison) == ["FP32", "AMP bfloat16"]


def test_of_several_models_a_long_name_loses_its_middle_and_no_precision(tmp_path):
    _, comparison = compare(make_run(tmp_path / "a", model=LONG), make_run(tmp_path / "b", "amp-bf16"))
    assert answer.short_labels(comparison) == ["ResNet18 AMP bfloat16", "timm:a_name_of_a_mode… FP32"]
