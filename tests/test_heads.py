"""Learning rates: of all heads and nothing else while the rest is frozen, and of transformer blocks one by one."""

import pytest
import tiny
import torch
from torch import nn
from torchvision import models
from torchvision.models import _api as torchvision_registry

from distributed import Ranks
from model import Network, build_model, head_names
from optimizer import block_depths, parameter_groups
from utils import seed_everything

HEADS = ("head.linear", "head_dist.linear")


class NormLinear(nn.Module):
    """A head as LeViT has it: its normalisation is published with the network, its linear layer is new."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(inputs)
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(self.bn(features))


class TwoHeads(nn.Module):
    """A network whose logits are the mean of two heads, and one layer whose name begins like theirs."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.pretrained_cfg = {"classifier": HEADS}
        self.body = nn.Conv2d(3, 6, 3, stride=2)
        self.head_norm = nn.LayerNorm(6)
        nn.init.normal_(self.head_norm.bias)  # at 0 what follows would not depend on its scale
        self.head = NormLinear(6, num_classes)
        self.head_dist = NormLinear(6, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.head_norm(self.body(images).relu().mean((2, 3))).relu()
        return (self.head(features) + self.head_dist(features)) / 2


def register_two_heads() -> None:
    """Register `TwoHeads` as one of torchvision's models in this process: `--model=tiny_two_heads`."""

    def tiny_two_heads(*, weights: None = None, **options: int) -> TwoHeads:
        return TwoHeads(**options)

    tiny_two_heads.__module__ = "torchvision.models.tiny"
    torchvision_registry.BUILTIN_MODELS["tiny_two_heads"] = tiny_two_heads


@pytest.fixture
def two_heads():
    register_two_heads()
    return "--model=tiny_two_heads"


def in_heads(model: nn.Module) -> set[str]:
    """Names of the parameters of every head, found without the program's own rule."""
    heads = [model.get_submodule(name) for name in head_names(model)]
    inside = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters that an epoch with frozen layers trains."""
    network = Network(model, sizes={4}, evaluation_size=4, ranks=Ranks(), heads=head_names(model), freeze_epochs=1)
    network.begin_epoch(0)
    return set(network.trained_names())


def fastest_names(model: nn.Module) -> set[str]:
    """Names of the parameters whose learning rate is not the backbone's."""
    groups = parameter_groups(model, head_names(model), learning_rate=1.0, weight_decay=0.0, backbone_lr=0.1)
    fastest = {id(parameter) for group in groups if group["lr"] == 1.0 for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in fastest}


@pytest.mark.parametrize("make", [TwoHeads, models.squeezenet1_1, models.vgg11])
def test_all_of_every_head_and_nothing_else_learns_while_frozen_and_at_the_heads_rate(make):
    with torch.device("meta"):
        model = make(num_classes=7)
    assert in_heads(model)
    assert trained_names(model) == fastest_names(model) == in_heads(model)


def test_frozen_layers_and_no_head_are_in_evaluation_mode():
    model = TwoHeads(3)
    trained_names(model)
    training = {name for name, module in model.named_modules() if module.training}
    assert training == {"", *HEADS}


@pytest.mark.parametrize(
    ("options", "still"),
    [
        (["--freeze_epochs=all"], {"body", "head_norm", "head.bn", "head_dist.bn"}),
        (["--backbone_lr=0"], {"body", "head_norm", "head.bn", "head_dist.bn"}),
        (["--preset=finetune", "--start_size=0"], set()),
    ],
    ids=["freeze_epochs", "backbone_lr", "finetune"],
)
def test_a_training_moves_both_heads(data, tmp_path, two_heads, options, still):
    words = [two_heads, "--epochs=1", "--warmup_epochs=0", "--learning_rate=0.1", "--augment=none", "--weight_decay=0"]
    assert tiny.train(data, tmp_path, *words, *options) == 0
    seed_everything(42)
    before = dict(build_model("tiny_two_heads", 3, pretrained=False).named_parameters())
    after = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    moved = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name.rpartition(".")[0] for name in before} - still


# ------------------------------------------------------------------------------- transformer blocks
class Mixer(nn.Module):
    """Attention by what it computes, whatever it is called, as XCiT, CaiT, Twins and ConViT have it."""

    def __init__(self, projection: str):
        super().__init__()
        self.add_module(projection, nn.Linear(4, 4))


class Block(nn.Module):
    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mixer = mixer


class AttentionPool(Mixer):
    pass


class Stage(nn.Module):
    """Blocks, and attention of its own that makes the map smaller, as LeViT has it."""

    def __init__(self, projection: str):
        super().__init__()
        self.downsample = Mixer(projection)
        self.blocks = nn.Sequential(Block(Mixer(projection)), Block(Mixer(projection)))


class Transformer(nn.Module):
    def __init__(self, blocks: nn.Module, pool: nn.Module | None = None):
        super().__init__()
        self.pretrained_cfg = {"classifier": "head"}
        self.stem = nn.Linear(4, 4)
        self.blocks = blocks
        self.norm = nn.LayerNorm(4)
        self.attn_pool = pool or nn.Identity()
        self.head = nn.Linear(4, 3)


def block_count(model: nn.Module) -> int:
    """How many blocks have a learning rate of their own, between that of the stem and that of the norm behind them."""
    depths = block_depths(model)
    of_blocks = [depths[name] for name in depths if ".mixer." in name or ".self_attn." in name]
    assert of_blocks == sorted(of_blocks) and set(of_blocks) == set(range(1, max(of_blocks) + 1))
    assert depths["stem.weight"] == 0 and depths["norm.weight"] == depths["head.weight"] == max(of_blocks) + 1
    return max(of_blocks)


@pytest.mark.parametrize("projection", ["q", "qk", "qkv"])
def test_blocks_are_found_by_what_their_attention_computes(projection):
    blocks = nn.ModuleList(Block(Mixer(projection)) for _ in range(3))
    assert block_count(Transformer(blocks)) == 3
    assert block_count(Transformer(blocks, AttentionPool("q"))) == 3
    stages = nn.Sequential(Stage(projection), Stage(projection))
    assert block_count(Transformer(stages)) == 4


def test_blocks_are_found_by_what_their_attention_is_called_and_pooling_makes_none(run, data, tmp_path):
    layers = [nn.TransformerEncoderLayer(4, 1, 4) for _ in range(2)]
    assert block_count(Transformer(nn.Sequential(*layers))) == 2
    model = Transformer(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), AttentionPool("q"))
    assert "Transformer has no attention blocks" in tiny.refused(block_depths, model)
    status, _, errors = run(tiny.words(data, tmp_path, "--layer_decay=0.5"))
    assert status == 2 and "--layer_decay is for transformers: Classifier has no attention blocks" in errors
