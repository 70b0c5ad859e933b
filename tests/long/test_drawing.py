"""A process that draws scenes and dies is said in words."""

import pytest

from images import demo
from images.demo import draw_demo
from utils import RunError


def test_a_process_that_dies_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IN_PROCESSES", 0)
    monkeypatch.setattr(demo, "_draw", _die)
    with pytest.raises(RunError, match="died"):
        draw_demo(tmp_path / "demo", train_images=12, test_images=12, workers=2)
    assert not (tmp_path / "demo" / "seg_train").exists()


def _die(_scenes):
    import os

    os._exit(1)
