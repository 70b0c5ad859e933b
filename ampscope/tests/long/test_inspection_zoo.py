"""`inspect_step` on models that others wrote, with random weights and small sizes: full reports, no false alarm.

What is not installed is skipped.
"""

import copy

import pytest
import torch
from torch import nn

from ampscope import inspect_step

PRECISIONS = ["fp32", "amp-bf16"]
functional = nn.functional
IDS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = SIZES | {"vocab_size": 128}
T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
TRANSFORMERS = {  # a model for each kind of layer: its configuration, its batch beside the labels
    "BertForSequenceClassification": WORDS,
    "T5ForConditionalGeneration": T5 | {"decoder_start_token_id": 0},
    "GPT2LMHeadModel": {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 128},
    "LlamaForCausalLM": WORDS,
    "MixtralForCausalLM": WORDS | {"num_key_value_heads": 4, "num_local_experts": 2, "num_experts_per_tok": 2},
    "MambaForCausalLM": {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "ViTForImageClassification": SIZES | {"image_size": 16, "patch_size": 8},
}


def cross_entropy(outputs, batch):
    return functional.cross_entropy(outputs, batch[1])


def of_transformers(name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name.partition("For")[0].partition("LM")[0] + "Config")(**TRANSFORMERS[name])
    model = getattr(transformers, name)(config)
    if "Llama" in name:
        model.gradient_checkpointing_enable()
    if "ViT" in name:
        return model, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}, None
    return model, {"input_ids": IDS, "labels": torch.tensor([0, 1]) if "Sequence" in name else IDS}, None


def of_torchvision(name):
    from torchvision import models

    return models.get_model(name, num_classes=8), (torch.randn(2, 3, 64, 64), torch.tensor([0, 1])), cross_entropy


def of_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=8, **({"img_size": 64} if "vit" in name else {}))
    return model, (torch.randn(2, 3, 64, 64), torch.tensor([0, 1])), cross_entropy


class Detector(nn.Module):
    """Takes images of several sizes and their targets, and returns a dictionary of losses, as torchvision's do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.boxes = nn.Linear(8, 4)
        self.classes = nn.Linear(8, 3)

    def forward(self, images, targets):
        seen = torch.stack([self.body(image[None]).relu().mean((0, 2, 3)) for image in images])
        boxes = torch.cat([target["boxes"] for target in targets])
        labels = torch.cat([target["labels"] for target in targets])
        return {
            "boxes": functional.l1_loss(self.boxes(seen), boxes),
            "classes": functional.cross_entropy(self.classes(seen), labels),
        }


def detector():
    targets = [{"boxes": torch.rand(1, 4), "labels": torch.tensor([index + 1])} for index in (0, 1)]
    return Detector(), ([torch.rand(3, 20, 24), torch.rand(3, 18, 20)], targets), None


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


ZOO = {
    **{name: lambda name=name: of_transformers(name) for name in TRANSFORMERS},
    **{name: lambda name=name: of_torchvision(name) for name in ("mobilenet_v3_small", "densenet121", "convnext_tiny")},
    **{f"timm:{name}": lambda name=name: of_timm(name) for name in ("test_vit2", "test_mambaout", "test_byobnet")},
    "a detector": detector,
    "lstm": lstm,
    "encoder with dropout": encoder,
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
