"""The check of an exported program: the same graph passes, whatever computes something else does not."""

import numpy as np
import pytest
import tiny
import torch
from test_pixels import SIDE, checkpoint, edges
from torch import nn

from commands import export
from commands.export import FromPixels, differences, drawn_pictures, images_of_test
from runs.checkpoint import load_checkpoint


class Session:
    """Stands for ONNX Runtime: what a changed copy of the network gives."""

    def __init__(self, network):
        self.network = network
        network.with_parts = True

    def run(self, names, inputs):
        assert names == ["probabilities", "logits", "pixels"]
        with torch.inference_mode():
            return [part.numpy() for part in self.network(torch.from_numpy(inputs["images"].copy()))]


def sure():
    """Build a network with probability 1.000 for one class, whatever the image."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        network[4].bias.copy_(torch.tensor([0.0, 40.0, 0.0]))
    return network


def compared(network, other, interpolation="bicubic"):
    asked = checkpoint(interpolation)
    session = Session(FromPixels(other, asked))
    batches = [*drawn_pictures(SIDE), edges(20, 17)]
    found = [differences(session, FromPixels(network, asked), export.as_predict(asked), batch) for batch in batches]
    return np.max(found, 0)[:3]


def test_the_same_graph_passes_the_check_of_the_export():
    pixels, logits, probabilities = compared(sure(), sure())
    assert pixels <= export.PIXELS and logits < 1e-5 and probabilities < 1e-5


@pytest.mark.parametrize("layer", [2, 4])
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_wrong_graph_fails_although_softmax_hides_it(layer, what):
    wrong = sure()
    with torch.no_grad():
        getattr(wrong[layer], what).mul_(1.5)
    _, logits, probabilities = compared(sure(), wrong)
    assert logits > export.IN_FLOAT32["logits"] and probabilities < 1e-6


def test_a_graph_that_resizes_in_another_way_fails(monkeypatch):
    def without_clamp(images, size, interpolation):
        return nn.functional.interpolate(images, size, mode=interpolation, antialias=True)

    monkeypatch.setattr(export, "resize", without_clamp)
    assert compared(sure(), sure())[0] > 10


def test_a_graph_that_gives_nan_fails():
    wrong = sure()
    with torch.no_grad():
        wrong[4].bias[0] = torch.nan
    found = compared(sure(), wrong)
    assert not found[1] <= export.IN_FLOAT32["logits"] and not found[2] <= export.IN_FLOAT32["probabilities"]


def test_the_check_takes_test_images_of_the_run_where_they_are_there(data, tmp_path):
    assert tiny.train(data, tmp_path, "--model=tiny_classifier", "--epochs=1", "--image_size=20") == 0
    run = tmp_path / "run"
    content = load_checkpoint(run / "best_model.pt")
    found = images_of_test(content, run, most=3)
    assert [image.shape for image in found] == [(20, 20, 3)] * 3
    assert len(images_of_test(content, run, most=100)) == 6
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace(str(data.resolve()), str(tmp_path / "moved")))
    assert images_of_test(content, run) == []
    (run / "config.json").unlink()
    assert images_of_test(content, run) == []
