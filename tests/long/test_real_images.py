"""Real photographs, if the Intel archive lies beside the checkout."""

import json

import pytest
import tiny
import torch
from test_dataset import IMAGENET_STD, assert_within_two_levels, fed, opened, torchvisions

CLASSES = ["buildings", "forest", "glacier", "mountain", "sea", "street"]


def test_real_images_train_and_test(real_folder, tmp_path):
    assert tiny.train(real_folder, tmp_path, "--model=resnet18", "--amp", "--epochs=1", "--batch_size=16") == 0
    assert tiny.config(tmp_path / "run")["dataset"]["classes"] == CLASSES
    assert sum(map(sum, json.loads((tmp_path / "run" / "result.json").read_text())["confusion"])) == 120


@pytest.mark.parametrize("side", [33, 256], ids=["smaller", "larger"])
def test_pixels_of_photographs_are_torchvisions(real_folder, side):
    data = opened(real_folder, side)
    images = torch.cat([images for images, *_ in fed(data, data.test, size=side).evaluation()])
    assert_within_two_levels(images, torchvisions(data.test.paths, side), IMAGENET_STD)
