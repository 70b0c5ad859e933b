"""`inspect_step` on models that others wrote, with random weights and small sizes: full reports, no false alarm.

What is not installed is skipped. Large ones need a switch:
INSPECTION_ZOO=1 pytest ampscope/tests/long/test_inspection_zoo.py
"""

import copy
import os

import pytest
import torch
from torch import nn

from ampscope import inspect_step

PRECISIONS = ["fp32", "amp-bf16"]
functional = nn.functional


def pixel_loss(outputs, batch):
    return functional.cross_entropy(outputs["out"], batch[1]) + 0.5 * functional.cross_entropy(outputs["aux"], batch[1])


def fcn():
    from torchvision.models.segmentation import fcn_resnet50

    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)
    return model, (torch.randn(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))), pixel_loss


def ssd():
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    targets = [{"boxes": torch.tensor([[20.0, 20, 200, 220]]), "labels": torch.tensor([index + 1])} for index in (0, 1)]
    return model, ([torch.rand(3, 200, 240), torch.rand(3, 180, 200)], targets), None


def vit():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64, depth=3)
    batch = torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,))
    return model, batch, lambda outputs, batch: functional.cross_entropy(outputs, batch[1])


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 30000, (4, 32))
    mask = torch.ones(4, 32, dtype=torch.long)
    mask[1, 20:] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1])}, None


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    model.gradient_checkpointing_enable()
    ids = torch.randint(0, 512, (4, 32))
    return model, {"input_ids": ids, "labels": ids}, None


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.lstm = nn.LSTM(32, 64, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 10)

    def forward(self, words):
        return self.head(self.lstm(self.embed(words))[0])


def lstm():
    batch = torch.randint(0, 100, (4, 24)), torch.randint(0, 10, (4, 24))
    return Tagger(), batch, lambda outputs, batch: functional.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())


def unet3d():
    networks = pytest.importorskip("monai.networks.nets")
    model = networks.UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2))
    batch = torch.randn(1, 1, 32, 32, 32), torch.randint(0, 2, (1, 32, 32, 32))
    return model, batch, lambda outputs, batch: functional.cross_entropy(outputs, batch[1])


def diffusion():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    batch = {
        "sample": torch.randn(2, 3, 16, 16),
        "timestep": torch.tensor([10, 500]),
        "noise": torch.randn(2, 3, 16, 16),
    }
    return model, batch, lambda outputs, batch: functional.mse_loss(outputs.sample, batch["noise"])


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 1), torch.randn(2, 256, 32), lambda outputs, batch: outputs.square().mean()


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1)) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, inputs):
        for block in self.blocks:
            inputs = torch.utils.checkpoint.checkpoint(block, inputs, use_reentrant=self.reentrant)
        return inputs


def checkpointed(reentrant):
    batch = torch.randn(8, 64, requires_grad=True)
    return Checkpointed(reentrant), batch, lambda outputs, batch: outputs.square().mean()


class Swish(torch.autograd.Function):
    """As PyTorch's notes on AMP ask for it."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(context, inputs, weight):
        context.save_for_backward(inputs, weight)
        return inputs.mm(weight)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(context, gradient):
        inputs, weight = context.saved_tensors
        return gradient.mm(weight.t()), inputs.t().mm(gradient)


class WithFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, inputs):
        return Swish.apply(inputs, self.weight)


def custom_function():
    return WithFunction(), torch.randn(8, 64), lambda outputs, batch: outputs.float().square().mean()


LARGE = ("fcn_resnet50", "ssdlite", "diffusion")
ZOO = {
    "fcn_resnet50": fcn,
    "ssdlite": ssd,
    "vit": vit,
    "bert": bert,
    "llama with checkpointing": llama,
    "lstm": lstm,
    "encoder with dropout": encoder,
    "unet3d": unet3d,
    "diffusion": diffusion,
    "checkpoint": lambda: checkpointed(False),
    "reentrant checkpoint": lambda: checkpointed(True),
    "custom function": custom_function,
}


def hooks_of(model):
    return [len(hooks) for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]


def told(report):
    return [(finding.rule, finding.level, str(finding.place), finding.message) for finding in report.everything]


@pytest.mark.parametrize("name", ZOO)
def test_models_that_others_wrote(name):
    if name in LARGE and not os.environ.get("INSPECTION_ZOO"):
        pytest.skip("a minute or more; INSPECTION_ZOO=1 runs it")
    torch.manual_seed(0)
    model, batch, loss = ZOO[name]()
    model.train()
    before = copy.deepcopy(model.state_dict())
    hooks = hooks_of(model)
    report = inspect_step(model, batch, loss, precisions=PRECISIONS, speed=False)
    assert report.ok, told(report)
    content = report.content
    rows = content["dtypes"]["amp-bf16"]
    assert content["precisions"]["amp-bf16"]["error"] is None
    assert any("bfloat16" in row["inputs"] for row in rows if row["phase"] == "backward")
    ledger = {row["precision"]: row for row in content["memory"]}
    assert 0 < ledger["amp-bf16"]["activations"] < 1.2 * ledger["fp32"]["activations"]
    assert any(row["nonzero"] for row in content["underflow"]["layers"])
    assert all(len(line) <= 80 for line in report.text().splitlines() if "/" not in line)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert hooks_of(model) == hooks


def test_a_compiled_model_is_traced_as_it_was_written():
    network = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
    compiled = torch.compile(network, backend="eager")
    batch = torch.randn(8, 32)
    report = inspect_step(compiled, batch, lambda outputs, batch: outputs.square().mean(), precisions=PRECISIONS)
    assert report.ok, told(report)
    rows = report.content["dtypes"]["amp-bf16"]
    assert {row["module"] for row in rows if row["op"] == "addmm"} == {"0", "2"}
    assert report.content["subject"]["name"] == "Sequential"


def test_a_distributed_model_is_inspected(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        network = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
        model = nn.parallel.DistributedDataParallel(network)
        batch = torch.randn(8, 32)
        report = inspect_step(model, batch, lambda outputs, batch: outputs.square().mean(), precisions=PRECISIONS)
    finally:
        torch.distributed.destroy_process_group()
    assert report.ok, told(report)
    rows = report.content["dtypes"]["amp-bf16"]
    assert {row["module"] for row in rows if row["op"] == "addmm"} == {"0", "2"}
