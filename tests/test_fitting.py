"""`--batch_size auto`: what fits follows from the model and the free memory alone, not from the process's past."""

import pytest
import tiny
import torch
from torch import nn

from precision import Precision
from runs import fitting

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU, "a test")
BF16 = Precision("amp-bf16", CPU, "a test")
SIDE = 20
CLASSES = 5
# What an update keeps of an image: its 3 channels; 4 channels in two layouts, which the convolution gives and the last
# layer takes; its logits after log_softmax, in float32; its label.
EACH = 4 * (3 * SIDE**2 + 2 * 4 * (SIDE - 2) ** 2 + CLASSES) + 8
SPARE_EACH = fitting.SPARE * EACH


def network(hidden: int = 1) -> nn.Module:
    """Return a network that keeps EACH bytes of an image; its `hidden` rows of weights keep almost nothing."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3)
    return nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten(), Wide(4 * (SIDE - 2) ** 2, hidden))


class Wide(nn.Module):
    """Logits from a few of its inputs' sums; its other weights count although nothing is computed with them."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.last = nn.Linear(inputs, CLASSES)
        self.unused = nn.Parameter(torch.zeros(hidden, 1024))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(features)


def once(model: nn.Module) -> int:
    return 4 * sum(parameter.nbytes for parameter in model.parameters())


def fitting_in(free, model, monkeypatch, *, most=4096, precision=FP32, processes=1) -> int:
    monkeypatch.setattr(fitting, "available_memory", lambda: None if free is None else int(free))
    return fitting.micro_batch_that_fits(model, SIDE, most, precision, CPU, processes=processes)


def test_what_an_image_keeps_is_counted_to_the_byte():
    kept = [fitting._kept_bytes(network(), count, SIDE, FP32, CPU) for count in (2, 3, 7)]
    assert [kept[1] - kept[0], kept[2] - kept[1]] == [EACH, 4 * EACH]


@pytest.mark.parametrize("images", [2, 3, 63, 64, 4096])
def test_the_largest_power_of_two_that_fits_is_taken(monkeypatch, images):
    model = network()
    free = (once(model) + images * SPARE_EACH) / fitting.USABLE + 1000
    assert fitting_in(free, model, monkeypatch) == 2 ** (images.bit_length() - 1)
    assert fitting_in(free, model, monkeypatch, most=images) == images
    assert fitting_in(3 * free, model, monkeypatch, processes=3) == 2 ** (images.bit_length() - 1)


def test_two_that_do_not_fit_are_refused_and_all_fit_where_the_system_does_not_say_what_is_free(monkeypatch):
    model = network()
    free = (once(model) + 2 * SPARE_EACH) / fitting.USABLE - 1000
    assert "not even 2 images fit" in tiny.refused(fitting_in, free, model, monkeypatch)
    assert fitting_in(free, model, monkeypatch, most=1) == 1
    assert fitting_in(None, network(), monkeypatch, most=77) == 77


def test_weights_count_once_however_large_they_are_and_wherever_they_come_from(monkeypatch, tmp_path):
    """Gradients of many weights once counted as a cost of each image, unless the weights had come from a file."""
    drawn = network(hidden=5_000)  # 20 MB beside 15 kB an image
    torch.save(drawn.state_dict(), tmp_path / "weights.pt")
    loaded = network(hidden=5_000)
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    free = (once(drawn) + 100 * SPARE_EACH) / fitting.USABLE
    assert fitting_in(free, drawn, monkeypatch) == fitting_in(free, loaded, monkeypatch) == 64


def test_freed_memory_is_handed_back_before_free_memory_is_read(monkeypatch):
    told = []
    monkeypatch.setattr(fitting, "return_freed_memory", lambda: told.append("handed back"))
    monkeypatch.setattr(fitting, "available_memory", lambda: told.append("read") or 2**40)
    assert fitting.micro_batch_that_fits(network(), SIDE, 8, FP32, CPU) == 8
    assert told == ["handed back", "read"]


def test_sixteen_bits_keep_less_of_an_image_and_copies_of_the_weights_once(monkeypatch):
    model = network()
    kept = [fitting._kept_bytes(network(), count, SIDE, BF16, CPU) for count in (2, 3)]
    assert EACH / 2 < kept[1] - kept[0] < 0.8 * EACH  # images come in float32
    assert kept[0] - 2 * (kept[1] - kept[0]) > model[3].last.weight.nbytes / 2
    free = (once(model) + 64 * SPARE_EACH) / fitting.USABLE
    assert fitting_in(free, model, monkeypatch, precision=BF16) == 64


def test_the_model_is_left_as_it_was(monkeypatch):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitting_in(2**30, model, monkeypatch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
