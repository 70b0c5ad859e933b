"""What was measured is what is said: ratios, times, reasons and advice. Run it alone: pytest tests/test_measured.py"""

import json
import re
from pathlib import Path

import pytest
from test_report import compare, make_run
from tqdm.utils import disp_len

from reports import page, tables


def seeded(folder: Path, rates: dict[str, list[float]], **options) -> dict:
    """A comparison whose runs of each precision have these images/s, seed by seed."""
    runs = [
        make_run(folder / f"{name}-{seed}", name, seed=seed, rates=(1.0, rate), **options)
        for name, found in rates.items()
        for seed, rate in enumerate(found)
    ]
    return compare(*runs)[1]


# Ratios over seeds


def test_one_fast_run_does_not_make_a_speed_up(tmp_path):
    comparison = seeded(tmp_path, {"fp32": [20.0, 155.0, 21.0], "amp-bf16": [40.0, 42.0, 41.0]})
    amp = comparison["rows"][1]
    assert amp["ratios"]["speed_up"]["values"] == pytest.approx([2.0, 42 / 155, 41 / 21])
    assert amp["speed_up"] is None, "seed by seed 0.27 to 2 times as fast is no gain"
    (sentence,) = comparison["remarks"]
    assert "No speed-up is stated for ResNet18 AMP bfloat16" in sentence and "0.27 to 2.00" in sentence
    page.html_comparison(tmp_path, [], comparison, tmp_path / "report.html")
    told = [tables.performance_table(comparison), tables.terminal_table(comparison), json.dumps(comparison)]
    for text in [*told, (tmp_path / "report.html").read_text()]:
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
    tested = make_run(tmp_path / "tested", "amp-bf16")
    result = json.loads((tested / "result.json").read_text())
    (tested / "result.json").write_text(json.dumps(result | {"train_seconds": None, "images_per_second": 900.0}))
    (tested / "metrics.jsonl").unlink()
    comparison = compare(make_run(tmp_path / "fp32"), tested)[1]
    assert comparison["rows"][1]["speed_up"] is None and "| – |" in tables.performance_table(comparison)
