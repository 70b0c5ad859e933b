"""torchvision's ImageNet weights in each form in which files of them are published.

Old files hold no batch counters or no versions of modules, DenseNet's have other names, the first wide ResNets' are
half precision. No network: every entry has a value of its own.
"""

import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision import models

from model import build_model, empty_model, head_names

FORMS = {  # the file's weights, then what its form lacks
    "today's": "mobilenet_v3_small IMAGENET1K_V1",
    "today's, without BatchNorm": "swin_t IMAGENET1K_V1",
    "no versions": "resnet50 IMAGENET1K_V1 versions",
    "no versions, without BatchNorm": "squeezenet1_1 IMAGENET1K_V1 versions",
    "no counters": "resnet18 IMAGENET1K_V1 counters",
    "no counters, no versions": "shufflenet_v2_x0_5 IMAGENET1K_V1 counters versions",
    "other names": "densenet121 IMAGENET1K_V1 counters versions names",
    "half precision": "wide_resnet50_2 IMAGENET1K_V1 counters float32",
    "auxiliary heads": "googlenet IMAGENET1K_V1",
    "auxiliary heads, no counters": "inception_v3 IMAGENET1K_V1 counters",
    "of another size": "vit_b_16 IMAGENET1K_SWAG_E2E_V1",
    "of one size": "maxvit_t IMAGENET1K_V1",
}


@pytest.fixture
def uninitialised(monkeypatch):
    """Constructors leave weights as memory has them: drawing them would take seconds."""
    for name in dir(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


def constructed(name, weights):
    """Return the network that a file was saved from, at its size and with its auxiliary heads."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        options["image_size"] = weights.meta["min_size"][0]
    return models.get_model(name, **options)


def published(state, lacking):
    """Return the state dict in the form of the file: marked, and without what that lacks."""
    form = OrderedDict()
    for entry, tensor in marked(state).items():
        if "counters" in lacking and entry.endswith("num_batches_tracked"):
            continue
        if "names" in lacking:
            entry = re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", entry)
        form[entry] = tensor.half() if "float32" in lacking and tensor.dim() > 1 else tensor
    if "versions" not in lacking:  # those of BatchNorm before it counted are 1
        form._metadata = {
            module: {"version": 1} if "counters" in lacking and f"{module}.running_mean" in state else of
            for module, of in state._metadata.items()
        }
    return form


def marked(state):
    """`state` with a value of its own in every entry, without memory for it."""
    return OrderedDict(
        (entry, torch.tensor(1 + number % 1000, dtype=tensor.dtype).expand(tensor.shape))
        for number, (entry, tensor) in enumerate(state.items())
    )


def decisions(model):
    """Everything plain that constructors set in the modules of a network, apart from its head."""
    head = head_names(model)
    return {
        (place, name): value
        for place, module in model.named_modules()
        if place not in head and not re.match(r"aux|Aux", place)
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple)) and name not in ("aux_logits", "num_classes")
    }


@pytest.mark.parametrize("file", FORMS.values(), ids=FORMS)
def test_published_weights_fill_all_but_the_head(uninitialised, monkeypatch, file):
    name, kind, *lacking = file.split()
    weights = models.get_model_weights(name)[kind]
    file = published(constructed(name, weights).state_dict(), lacking)
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *_, **__: renamed_copy(file))
    seen = []
    get_model = models.get_model
    monkeypatch.setattr(models, "get_model", lambda *_, **options: seen.append(get_model(*_, **options)) or seen[-1])
    model = build_model(name, 6, weights=weights.name, image_size=None)
    original = seen[0]  # as torchvision's own constructor fills it
    head = head_names(model)
    expected = original.state_dict()
    assert same(next(iter(expected.values())), next(iter(file.values())).float())
    for entry, tensor in model.state_dict().items():
        if entry.rpartition(".")[0] in head:
            assert len(tensor) == 6
        else:
            assert same(tensor, expected[entry]), entry
    assert decisions(model) == decisions(original)
    again = empty_model(name, 6, model.constructor_options)
    assert decisions(again) == decisions(original)


def renamed_copy(file):
    copy = OrderedDict(file)
    if hasattr(file, "_metadata"):
        copy._metadata = file._metadata
    return copy


def same(tensor, other):
    """Equal at both ends and in the middle: every entry of a marked file has one value."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    places = [0, tensor.numel() // 2, tensor.numel() - 1] if tensor.numel() else []
    return all(tensor.flatten()[place] == other.flatten()[place] for place in places)
