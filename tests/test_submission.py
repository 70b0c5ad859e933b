"""A sample_submission.csv is filled as it is: ids, header, order, columns. Run: pytest tests/test_submission.py"""

import numpy as np
import pytest
import tiny

from commands.submission import read_sample
from utils import RunError, UserError

CLASSES = ["cat", "dog"]
SHARES = {"007.png": [0.25, 0.75], "010.png": [0.9, 0.1]}
SAMPLES = {
    "label": ("Id,Category\r\n10,dog\r\n7,dog\r\n10,dog\r\n", "Id,Category\r\n10,cat\r\n7,dog\r\n10,cat\r\n"),
    "other columns": ("id;label;use\r\n7;;x\r\n", "id;label;use\r\n7;dog;x\r\n"),
    "classes in another order and spelling": (
        "image,Dog,cat\nC:\\work\\pets\\010,0,0\n007.PNG,,\n",
        "image,Dog,cat\r\nC:\\work\\pets\\010,0.100000,0.900000\r\n007.PNG,0.750000,0.250000\r\n",
    ),
    "one class": ("id,dog\n7,0.5\n", "id,dog\r\n7,0.750000\r\n"),
    "no header": ("007.png,cat\n010,cat\n", "007.png,dog\r\n010,cat\r\n"),
}
WRONG = {
    "id,label\n7,cat\n11,cat\n12,cat\n": "2 rows name no image below .*, such as '11'",
    "id,dog,emu\n7,0,0\n": "1 column is no class of the model: emu. Its classes are cat, dog",
    "id,label\nx,cat\n": "no cell names an image below .*, where 2 images are",
    "id,a,b\n7,0,0\n": "which column is the label, of a, b",
}


@pytest.fixture
def folder(tmp_path):
    for name in SHARES:
        tiny.save_noise(tmp_path / "pets" / name)
    return tmp_path / "pets"


def filled(folder, text, left_out=()):
    sample = folder.parent / "sample.csv"
    sample.write_text(text, newline="")
    found = read_sample(sample, [str(folder)], CLASSES)
    for path in set(found.paths):
        if path.name not in left_out:
            found.add(path, np.array(SHARES[path.name]))
    found.write(folder.parent / "out.csv")
    return (folder.parent / "out.csv").read_bytes().decode()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_filled_in_its_own_form(folder, name):
    given, wanted = SAMPLES[name]
    assert filled(folder, given) == wanted


@pytest.mark.parametrize("text", WRONG)
def test_what_a_sample_cannot_mean_is_said(folder, text):
    with pytest.raises(UserError, match=WRONG[text]):
        filled(folder, text)


def test_an_image_without_an_answer_leaves_no_file(folder):
    with pytest.raises(RunError, match=r"out.csv is not written: 1 image has no answer, such as .*010.png"):
        filled(folder, SAMPLES["label"][0], left_out=["010.png"])
    assert not (folder.parent / "out.csv").exists()


def test_one_folder_holds_the_images_and_labels_of_no_class_are_said(folder, caplog):
    filled(folder, "id,label\n7,0.5\n")
    assert "labels that are not classes of the model, such as '0.5': the answers are cat, dog" in caplog.text
    assert "name the one folder" in tiny.refused(read_sample, folder, [str(folder), "x"], CLASSES)
