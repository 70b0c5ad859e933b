"""Pictures of a report in every form: long and diverged runs, many classes, hostile names, sheets."""

import base64
import io
import math
import re

import numpy as np
import pytest
from PIL import Image
from test_report import HOSTILE, compare, is_picture, make_run

from ampscope import look
from reports import curves, page, pictures, results, sheets
from runs.result import cells_of

pytestmark = pytest.mark.usefixtures("drawn")


@pytest.mark.parametrize("epochs, scales", [(1, None), (120, [2048.0, 1024.0])])
def test_learning_curve(tmp_path, epochs, scales):
    run = results.read_run(make_run(tmp_path / "run", rates=[100.0] * epochs, scales=scales and scales * (epochs // 2)))
    pictures.learning_curve(run["metrics"], tmp_path / "a.png", title="$\\frac{$", best_epoch=epochs)
    assert is_picture(tmp_path / "a.png")[1] == (900 if scales else 690)


def test_learning_curve_of_a_diverged_run(tmp_path):
    metrics = [
        {"epoch": 1, "train_loss": math.nan, "val_loss": None, "val_acc": math.inf},
        {"epoch": 2, "train_loss": 1.0, "loss_scale": 0.25},
    ]
    pictures.learning_curve(metrics, tmp_path / "a.png", title="t", best_epoch=None)
    is_picture(tmp_path / "a.png")


@pytest.mark.parametrize("number", [6, 1000])
def test_confusion_matrix(tmp_path, number):
    classes = (HOSTILE + [f"class {place}" for place in range(number)])[:number]
    pictures.confusion_matrix(cells_of(np.eye(number, dtype=int), number), classes, tmp_path / "a.png", title="t" * 300)
    assert max(is_picture(tmp_path / "a.png")) < 3500


def test_reliability_curve(tmp_path):
    runs = [results.read_run(make_run(tmp_path / name, name)) for name in ("fp32", "amp-bf16")]
    (tmp_path / "amp-bf16" / "predictions.csv").unlink()
    pictures.reliability_curve(runs, tmp_path / "a.png")
    is_picture(tmp_path / "a.png")
    assert results.run_calibration(runs[0])["ece"] == pytest.approx(0.2) and results.run_calibration(runs[1]) is None


@pytest.mark.parametrize("number", [2, 9])
def test_class_curves_leave_out_a_class_without_images(tmp_path, number):
    truth = [place % number for place in range(40)]
    run = make_run(tmp_path / "run", classes=[*HOSTILE, "g", "h", "i"][:number], truth=truth)
    result = results.read_run(run)["result"]
    drawn = tmp_path / "a.png"
    curves.class_curves(result, run / "predictions.csv", drawn, title="t")
    assert not drawn.exists()  # the result is older than these figures
    rows = list(result["per_class"].values())
    for row in rows:
        row |= {"roc_auc": 0.9, "average_precision": 0.8}
    curves.class_curves(result, run / "predictions.csv", drawn, title="t")
    assert is_picture(drawn)[0] == (2160 if number == 2 else 1440)
    rows[0] |= {"roc_auc": None, "average_precision": None, "support": 0}
    curves.class_curves(result, run / "predictions.csv", tmp_path / "b.png", title="t")
    assert (
        is_picture(tmp_path / "b.png") == is_picture(drawn) and (tmp_path / "b.png").read_bytes() != drawn.read_bytes()
    )


def test_gallery_of_a_perfect_run_and_of_another_machine(tmp_path):
    run = make_run(tmp_path / "run")
    pictures.gallery(run / "predictions.csv", tmp_path / "nowhere", tmp_path / "a.png")
    other = make_run(tmp_path / "other", classes=HOSTILE, truth=[0, 1, 2, 3, 4, 5], predicted=[1, 2, 3, 4, 5, 0])
    pictures.gallery(other / "predictions.csv", tmp_path / "nowhere", tmp_path / "b.png")
    is_picture(tmp_path / "b.png")


def test_each_image_of_a_sheet_stands_in_its_place_under_a_whole_heading(tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
    images = [np.full((20, 10 * (1 + number), 3), colour, np.uint8) for number, colour in enumerate(colours)]
    sheets.labelled_sheet(images, ["one\ntwo"] * 4, tmp_path / "a.png", heading="many words " * 20, across=3)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    ink = np.flatnonzero((sheet < 200).all(2).any(0))
    assert sheet.shape[2] == 3 and ink.max() < sheet.shape[1] - 5
    found = [np.argwhere((sheet == colour).all(2)) for colour in colours]
    middles = [(places.min(0) + places.max(0)) / 2 for places in found]
    assert [[round(x), round(y)] == [240 + 480 * (n % 3), middles[n // 3 * 3][0]] for n, (y, x) in enumerate(middles)]
    for (height, width), image in zip((np.ptp(places, 0) + 1 for places in found), images, strict=True):
        assert width / height == pytest.approx(image.shape[1] / image.shape[0], rel=0.02) and height == 224


@pytest.mark.parametrize(("side", "kind"), [(40, "png"), (400, "webp")])
def test_a_page_holds_the_whole_picture_in_few_bytes(tmp_path, side, kind):
    pixels = np.random.default_rng(0).integers(100, 140, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    kept = re.fullmatch(
        f'<div class="scroll"><img src="data:image/{kind};base64,(.*)" alt="&lt;b&gt;" .*\n',
        page.picture(tmp_path / "a.png", "<b>", 9),
    )
    content = base64.b64decode(kept[1])
    assert len(content) <= min(150_000, (tmp_path / "a.png").stat().st_size)
    with Image.open(io.BytesIO(content)) as image:
        assert np.abs(np.asarray(image, float) - pixels).mean() < 15


def test_an_svg_has_colours_for_light_and_dark_pages_and_no_background(tmp_path, monkeypatch):
    for owner in (pictures, curves):
        monkeypatch.setattr(owner, "svg", look.svg)
    run = results.read_run(make_run(tmp_path / "run", scales=[2.0, 1.0, 2.0, 2.0]))
    drawn = pictures.learning_panels(run["metrics"], 2) | pictures.comparison_panels(*compare(tmp_path / "run"))
    assert list(drawn) == ["Loss", "Accuracy (%)", "Loss scale", *list(drawn)[3:]] and len(drawn) == 6
    for content in drawn.values():
        text = content.decode()
        style, _, rest = text.partition("</style>")
        assert "prefers-color-scheme:dark" in style and f"{look.BLUE.lower()};" in style
        assert "var(--c0)" in rest and not any(color.lower() in rest.lower() for color in look.DARK)
        assert 'width="360pt"' in text
