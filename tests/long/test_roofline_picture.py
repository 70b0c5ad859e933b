"""docs/roofline.py draws what a ladder's file says. Run: pytest tests/long/test_roofline_picture.py"""

import json
import sys

import tiny

SCRIPT = tiny.ROOT / "docs/roofline.py"


def rung(name, seconds, bound, *, kept=True):
    return {
        "name": name,
        "kept": kept,
        "skipped": "",
        "seconds_per_update": seconds,
        "bound_images_per_second": 10 / bound,
    }


FOUND = {
    "machine": {"name": "a machine"},
    "setting": {"model_name": "ResNet18", "batch_size": 10, "image_size": 64},
    "rungs": [
        rung("FP32", 0.110, 0.100),
        rung("slower", 0.200, 0.100, kept=False),
        {"name": "TF32", "kept": False, "skipped": "no GPU"},
        rung("AMP", 0.055, 0.050),
        rung("compiled", 0.050, 0.050),
    ],
    "roofline_of": "AMP",
    "roofline": {
        "groups": {
            "normalization": {"bound_seconds": 0.025},
            "convolutions": {"bound_seconds": 0.0245},
            "pooling": {"bound_seconds": 0.0005},
        }
    },
}


def test_the_picture_and_its_sentence(tmp_path, monkeypatch, capsys):
    module = tiny.module_of(SCRIPT)
    assert [rung["name"] for rung in module.rungs_of(FOUND)] == ["FP32", "AMP"], "those that were kept"
    groups = module.groups_of(FOUND)
    assert list(groups) == ["convolutions", "normalization", "others"], "products first, small ones together"
    assert abs(sum(groups.values()) - 50) < 1e-9
    file = tmp_path / "ladder.json"
    file.write_text(json.dumps(FOUND))
    monkeypatch.setattr(module, "__file__", str(tmp_path / "roofline.py"))
    monkeypatch.setattr(sys, "argv", ["roofline.py", str(file)])
    module.main()
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "still take 26 ms of 50" in said and "falls by 2.0" in said and "by 3.9 at most" in said
