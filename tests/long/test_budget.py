"""--budget: as many epochs as fit into the time, after which the run is that of --epochs."""

import time

import pytest
import tiny
import torch
from test_option import parse, refused

from command_line.groups import Training, take
from commands import budget
from commands.budget import epochs_within


@pytest.mark.parametrize(
    ("words", "seconds", "epochs"),
    [
        ("", 100, 8),  # of 10 s of updates and 2 s of validation each
        ("", 96, 8),
        ("", 95.9, 7),
        ("", 5, 1),
        ("", -5, 1),
        ("--freeze_epochs=3", 5, 4),
        ("--warmup_epochs=2.5", 5, 3),
        ("--start_size=64", 5, 2),
        ("--start_size=64", 24, 3),  # 64, 64 and 256 px: 1.25, 1.25 and 10 s, and 6 s of validations
    ],
)
def test_as_many_epochs_as_fit_and_as_other_options_need(words, seconds, epochs):
    training = take(Training, parse(*words.split()))
    assert epochs_within(seconds, 10.0, 2.0, training, 256) == epochs


def test_growing_images_fill_the_time():
    training = take(Training, parse("--start_size=64"))
    for seconds in (300, 1000, 5000):
        epochs = epochs_within(seconds, 10.0, 2.0, training, 256)
        sizes = [budget.growing_sizes(64, 256, count) for count in (epochs, epochs + 1)]
        totals = [sum(10 * (size / 256) ** 1.5 + 2 for size in each) for each in sizes]
        assert totals[0] <= seconds < totals[1]


def test_a_run_with_a_budget_is_that_of_its_epochs_and_keeps_them(tmp_path, monkeypatch):
    data = tiny.draw(tmp_path / "data")
    found = []

    def told(trainer, measured=budget.measured):
        found.append(measured(trainer))
        return 10.0, 2.0

    monkeypatch.setattr(budget, "SAMPLE", 0.05)
    monkeypatch.setattr(budget, "measured", told)
    monkeypatch.setattr(budget, "STARTED", time.monotonic())
    words = [
        word for word in tiny.words(data, tmp_path, "--budget=40s", "--ema=0.9", "--amp") if "--epochs" not in word
    ]
    assert tiny.main.main(words) == 0
    assert tiny.config(tmp_path / "run")["options"]["epochs"] == 3 == len(tiny.metrics(tmp_path / "run"))
    ((updates, validation),) = found
    assert 0 < updates < 10 and 0 < validation < 10
    assert tiny.train(data, tmp_path, "--epochs=3", "--ema=0.9", "--amp", name="same") == 0
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("run", "same"))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in other[part])
    assert tiny.main.main([*words, "--resume"]) == 0 and len(found) == 1  # finished: only tested again
    longer = [word.replace("40s", "10m") for word in words]
    assert tiny.main.main([*longer, "--resume"]) == 0 and len(tiny.metrics(tmp_path / "run")) == 3


def test_a_budget_chooses_the_epochs_alone():
    assert "leave out --epochs" in refused("--budget=5m", "--epochs=3")
    assert "--freeze_epochs all" in refused("--budget=5m", "--freeze_epochs=all")
    assert parse("--budget=5m", "--preset=finetune").budget == "5m"
