"""Real photographs, if the Intel archive lies beside the checkout."""

import json

import numpy as np
import pytest
import torch
from test_dataset import IMAGENET_STD, assert_within_two_levels, fed, opened, torchvisions
from tiny import SMALL

CLASSES = ["buildings", "forest", "glacier", "mountain", "sea", "street"]


def read(folder, name):
    return json.loads((folder / name).read_text())


def words(folder, checkpoints, name="run", *more):
    return [f"--data_dir={folder}", f"--checkpoint_dir={checkpoints}", f"--checkpoint_name={name}", *SMALL, *more]


def test_real_images_train_and_test(real_folder, tmp_path, run):
    status, out, err = run(words(real_folder, tmp_path, "real", "--amp", "--epochs=1"))
    assert status == 0, err
    assert read(tmp_path / "real", "config.json")["dataset"]["classes"] == CLASSES
    assert np.array(read(tmp_path / "real", "result.json")["confusion"]).sum() == 120


@pytest.mark.parametrize("side", [33, 256], ids=["smaller", "larger"])
def test_pixels_of_photographs_are_torchvisions(real_folder, side):
    data = opened(real_folder, side)
    images = torch.cat([images for images, *_ in fed(data, data.test, size=side).evaluation()])
    assert_within_two_levels(images, torchvisions(data.test.paths, side), IMAGENET_STD)
