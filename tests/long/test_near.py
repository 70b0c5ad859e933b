"""Nearly equal pictures of two parts are found by the inputs of a network's head."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image
from torch import nn

import main
from commands import near


class Coarse(nn.Module):
    """A network whose head gets the brightness of 8 x 8 fields, less the mean."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(8)
        self.fc = nn.Linear(192, 3)

    def forward(self, images):
        fields = self.pool(images).flatten(1)
        return self.fc(fields - fields.mean(1, keepdim=True))


@pytest.mark.parametrize("asked", [True, False])
def test_a_frame_beside_its_neighbour_is_found_in_the_other_part(asked, tmp_path, monkeypatch, capsys):
    for seed, name in enumerate(("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png")):
        tiny.save_noise(tmp_path / "data" / name, seed, (8, 8))
    first = Image.open(tmp_path / "data" / "train/a/1.png").resize((80, 80), Image.Resampling.NEAREST)
    pixels = np.clip(1.1 * np.asarray(first, float), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).crop((2, 2, 80, 80)).save(tmp_path / "data" / "test/a/3.png")
    monkeypatch.setattr(near, "build_model", lambda *_, **__: Coarse().eval())
    words = ["prepare", "--check", f"--data_dir={tmp_path / 'data'}", f"--json={tmp_path / 'report.json'}"]
    assert main.main([*words, *(["--model=ResNet18"] if asked else [])]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["across_splits"] == []
    assert ("nearly equal pictures" in out) == ("near" in report) == asked
    if asked:
        assert [pair[:2] for pair in report["near"]] == [["train/a/1.png", "test/a/3.png"]]
        assert "train/a/1.png ~ test/a/3.png" in out
