"""Activation checkpointing changes the memory of an update, not its gradients, buffers or random numbers."""

import copy

import pytest
import tiny
import torch
import torchvision

from features.checkpointing import checkpoint_blocks
from features.float32_layers import keep_layers_float32
from precision import named_precision
from runs.fitting import _kept_bytes
from utils import UserError

CPU = torch.device("cpu")


def of_timm(name, **options):
    return pytest.importorskip("timm").create_model(name, **options)


MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "vit": lambda: of_timm("vit_tiny_patch16_224", img_size=64, drop_rate=0.1, attn_drop_rate=0.1),
    "swin": lambda: torchvision.models.swin_t(),  # with stochastic depth
    "efficientnet": lambda: of_timm("efficientnet_lite0", drop_path_rate=0.1),
    "densenet": lambda: torchvision.models.densenet121(),
}


def one_update(model, precision):
    """Return the gradients and the buffers after one update on 4 images."""
    torch.manual_seed(1)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with precision.autocast():
        loss = model.train()(images).float().square().mean()
    loss.backward()
    return {name: each.grad for name, each in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("regime", ["fp32", "amp-bf16"])
def test_gradients_and_buffers_are_those_of_the_plain_model(name, regime):
    precision = named_precision(regime, CPU)
    plain = MODELS[name]()
    saving = copy.deepcopy(plain)
    assert len(checkpoint_blocks(saving)) >= 8
    saving = copy.deepcopy(saving)  # as an average of the weights does
    assert list(saving.state_dict()) == list(plain.state_dict())
    for expected, found in zip(one_update(plain, precision), one_update(saving, precision), strict=True):
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert _kept_bytes(saving, 2, 64, precision, CPU) < 0.6 * _kept_bytes(plain, 2, 64, precision, CPU)


def test_a_block_stays_in_float32_if_it_is_asked_to():
    model = keep_layers_float32(torchvision.models.resnet18(), "layer4.1")
    checkpoint_blocks(model)
    types = []
    model.layer4[1].conv1.register_forward_hook(lambda _, inputs, output: types.append(output.dtype))
    model.layer3[1].conv1.register_forward_hook(lambda _, inputs, output: types.append(output.dtype))
    one_update(model, named_precision("amp-bf16", CPU))
    assert types[:2] == [torch.bfloat16, torch.float32]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="no list of blocks"):
        checkpoint_blocks(torchvision.models.alexnet())


def test_a_run_is_the_same_run(data, tmp_path):
    more = ("--model=resnet18", "--image_size=32", "--epochs=2", "--amp")
    for name, words in (("plain", ()), ("saving", ("--checkpoint_blocks",))):
        assert tiny.train(data, tmp_path, *more, *words, name=name) == 0
    plain, saving = (tiny.metrics(tmp_path / name) for name in ("plain", "saving"))
    assert [line["train_loss"] for line in plain] == [line["train_loss"] for line in saving]
    assert [line["val_loss"] for line in plain] == [line["val_loss"] for line in saving]
