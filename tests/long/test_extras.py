"""What an optional package brings: it is used as it is, or named where it is missing."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_inspection_module import GAN
from test_weights import assert_loaded, network
from tiny import refused
from torch import nn
from torchvision import models
from whole_step import LOSS, written

from ampscope import module as command
from commands import prepare
from features.activation_maps import activation_maps
from images.check import check
from images.decode import decode, try_decode
from images.folders import find_image_set, find_images
from model import build_model
from pretrained.files import load_file
from utils import RunError


def test_maps_agree_with_those_of_the_package_grad_cam():
    reference = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    model = models.resnet18(num_classes=5).eval()
    images = torch.randn(3, 3, 96, 96)
    classes = [1, 4, 0]
    cam = reference.GradCAM(model=model, target_layers=[model.layer4[-1]])
    expected = torch.from_numpy(cam(images, [ClassifierOutputTarget(index) for index in classes]))
    found = activation_maps(model, images, torch.tensor(classes))
    lowest = found.amin((1, 2), keepdim=True)  # the package stretches each map to begin at 0
    stretched = (found - lowest) / (found.amax((1, 2), keepdim=True) - lowest)
    torch.testing.assert_close(stretched, expected, rtol=0, atol=1e-3)


def test_the_file_keeps_to_its_schema(tmp_path):
    validate = pytest.importorskip("jsonschema").validate
    schema = json.loads((tiny.ROOT / "ampscope" / "report.schema.json").read_text())
    broken = LOSS.replace("return model, batch", "model[2].weight.data[0, 0] = torch.nan\n    return model, batch")
    for text, precisions in ((GAN, None), (broken, ["fp32", "amp-fp16"])):
        report = command.inspect_module(written(tmp_path, text), precisions=precisions)
        report.write(tmp_path)
        content = json.loads((tmp_path / "inspect.json").read_text())
        validate(content, schema)
        assert content["ok"] == (text is GAN)


def test_heic_is_read_by_its_plugin_or_names_it(tmp_path, monkeypatch):
    plugin = pytest.importorskip("pillow_heif")
    path = tmp_path / "cat" / "photo.heic"
    path.parent.mkdir()
    picture = Image.fromarray(np.linspace(0, 255, 64 * 64 * 3).astype(np.uint8).reshape(64, 64, 3))
    plugin.from_pillow(picture).save(path)
    assert [found.name for found in find_images(tmp_path)] == ["photo.heic"]
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pillow_heif", None)
        for kind in ("HEIF", "AVIF_BY_HEIF"):
            patch.delitem(Image.OPEN, kind, raising=False)
        patch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
        assert "pip install pillow-heif" in try_decode(path, None)
    assert np.abs(decode(path).astype(int) - np.asarray(picture)).mean() < 6


def test_the_pictures_of_other_packages(tmp_path):
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    (tmp_path / "science").symlink_to(folder)
    sklearn = pytest.importorskip("sklearn.datasets")
    (tmp_path / "photos").symlink_to(Path(sklearn.__file__).parent / "images")
    found = find_image_set(tmp_path)
    assert Counter(label for _, label in found.train)[0] == 2
    assert {".py", ".txt"} <= found.passed_over.keys()
    report = check(tmp_path)
    assert report["sizes"]["640x427"] >= 2
    for name, reason in report["unreadable"].items():  # of a kind that Pillow does not read: the same everywhere
        assert try_decode(tmp_path / name, None) == reason
    assert len(report["unreadable"]) <= 1


def test_confident_learning_is_cleanlabs():
    filtering = pytest.importorskip("cleanlab.filter")
    from reports.doubt import find_doubtful

    random = np.random.default_rng(5)
    labels = random.integers(0, 4, 400)
    logits = random.normal(size=(400, 4)) + 2 * np.eye(4)[np.where(random.random(400) < 0.1, (labels + 1) % 4, labels)]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    theirs = filtering.find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1)
    ours = np.zeros(400, bool)
    ours[find_doubtful(probabilities, labels).order] = True
    assert np.array_equal(ours, theirs) and ours.sum() > 20


def test_offline_with_the_real_kagglehub_error():
    requests = pytest.importorskip("requests")
    error = prepare._download_error(requests.exceptions.ConnectionError("name resolution"), Path("data"))
    assert isinstance(error, RunError) and "offline" in str(error)


@pytest.mark.parametrize("name", ["weights.safetensors", "pytorch_model.bin"])
def test_safetensors_are_known_by_their_content(tmp_path, name):
    save_file = pytest.importorskip("safetensors.torch").save_file

    state = network().state_dict()
    save_file(state, tmp_path / name)
    assert_loaded(tmp_path / name, state)


def test_without_safetensors_the_package_is_named(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch").save_file

    save_file(network().state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in refused(load_file, tmp_path / "weights.safetensors")


def test_checkpoints_that_timm_writes(tmp_path):
    pytest.importorskip("timm")
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = network("resnet18")
    average = ModelEmaV3(model)
    average.module.load_state_dict(network("resnet18", seed=3).state_dict())
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args=argparse.Namespace(model="resnet18", mean=(0.5,), output=None),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, 0.5)
    (file,) = tmp_path.glob("checkpoint-*")
    assert_loaded(file, average.module.state_dict(), name="resnet18")
    message = refused(build_model, "resnet50", 6, pretrained_path=file)
    assert "resnet18" in message


def test_checkpoints_that_lightning_writes(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, rate: float, options: dict):
            super().__init__()
            self.save_hyperparameters()
            self.backbone = network()
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(6))

        def training_step(self, batch, number):
            return self.criterion(self.backbone(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.hparams.rate)

    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4))
    trainer = lightning.Trainer(
        max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        accelerator="cpu", enable_checkpointing=True,
    )  # fmt: skip
    module = Module(0.1, {"augment": ["flip"], "options": argparse.Namespace(depth=3)})
    trainer.fit(module, torch.utils.data.DataLoader(data, 2))
    trainer.save_checkpoint(tmp_path / "epoch=0.ckpt")
    assert_loaded(tmp_path / "epoch=0.ckpt", module.backbone.state_dict())
