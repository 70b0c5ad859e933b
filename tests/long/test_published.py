"""torchvision's ImageNet weights in the form in which they are published, the smallest file of each form.

What is in those files follows from their sizes, which torchvision states: old ones hold no batch counters, DenseNet's
have other names, some are in PyTorch's first format, the first wide ResNets' are half precision. No network.
"""

import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision import models

from model import build_model, empty_model, head_names

# Those below 400 MB have one of these forms, as `published_form` finds it for each.
FORMS = {
    "today's": "mobilenet_v3_small IMAGENET1K_V1",
    "today's, without BatchNorm": "swin_t IMAGENET1K_V1",
    "today's, first format": "mnasnet0_5 IMAGENET1K_V1",
    "no versions": "resnet50 IMAGENET1K_V1",
    "no versions, without BatchNorm": "squeezenet1_1 IMAGENET1K_V1",
    "no counters": "resnet18 IMAGENET1K_V1",
    "no counters, no versions, first format": "shufflenet_v2_x0_5 IMAGENET1K_V1",
    "other names": "densenet121 IMAGENET1K_V1",
    "half precision": "wide_resnet50_2 IMAGENET1K_V1",
    "auxiliary heads, first format": "googlenet IMAGENET1K_V1",
    "auxiliary heads, no counters": "inception_v3 IMAGENET1K_V1",
    "of another size": "vit_b_16 IMAGENET1K_SWAG_E2E_V1",
    "of one size": "maxvit_t IMAGENET1K_V1",
}


class Counter:
    """A file that keeps only how long it is."""

    def __init__(self):
        self.place = 0

    def write(self, content):
        self.place += len(content)
        return len(content)

    def seek(self, offset, whence=0):
        self.place = offset if whence == 0 else self.place + offset
        return self.place

    def tell(self):
        return self.place

    def flush(self):
        pass


def size(state, zipped):
    """MiB of the file that torch.save would write."""
    file = Counter()
    if zipped:
        with torch.serialization.skip_data():
            torch.save(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.place / 2**20


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


def forms(name, state):
    """Forms a file may have, the usual one first: (description, its state dict, in today's format of files)."""
    if name.startswith("densenet"):
        state = renamed(state, lambda entry: re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", entry))
    for half in (False, True):
        for counters in (True, False):
            for versions in (True, False):
                if not versions and name.startswith("mnasnet"):  # its loader asks for them
                    continue
                form = OrderedDict(state)
                for entry, tensor in state.items():
                    if not counters and entry.endswith("num_batches_tracked"):
                        del form[entry]
                    elif half and tensor.dim() > 1:
                        form[entry] = tensor.half()
                if versions:  # those of BatchNorm before it counted are 1
                    form._metadata = {
                        module: {"version": 1} if not counters and f"{module}.running_mean" in state else of
                        for module, of in state._metadata.items()
                    }
                for zipped in (True, False):
                    yield f"{half=} {counters=} {versions=} {zipped=}", form, zipped


def renamed(state, rename):
    result = OrderedDict((rename(entry), tensor) for entry, tensor in state.items())
    result._metadata = state._metadata
    return result


def published_form(name, weights, state):
    """Return the form with a file of the published size, or the nearest if none agrees to three decimals."""
    best = None
    for description, form, zipped in forms(name, state):
        difference = abs(size(form, zipped) - weights.meta["_file_size"])
        if best is None or difference < best[0]:
            best = (difference, description, form)
        if difference < 0.0015:
            break
    return best


def marked(state):
    """`state` with a value of its own in every entry, without memory for it."""
    result = OrderedDict(
        (entry, torch.tensor(1 + number % 1000, dtype=tensor.dtype).expand(tensor.shape))
        for number, (entry, tensor) in enumerate(state.items())
    )
    if hasattr(state, "_metadata"):
        result._metadata = state._metadata
    return result


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


@pytest.mark.parametrize("name, kind", [file.split() for file in FORMS.values()], ids=FORMS)
def test_published_weights_fill_all_but_the_head(uninitialised, monkeypatch, name, kind):
    weights = models.get_model_weights(name)[kind]
    difference, description, form = published_form(name, weights, constructed(name, weights).state_dict())
    assert difference < 0.02, f"no form has the published size; nearest: {description}"
    file = marked(form)
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
