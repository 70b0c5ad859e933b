"""Every family of torchvision and timm: its heads are found and alone trained while frozen; its blocks are found."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_heads import fastest_names, in_heads, trained_names

from model import build_model, head_names
from optimizer import attention_blocks, block_depths
from utils import UserError

SEVERAL = {
    "crossvit": 2,
    "efficientformer": 2,
    "efficientformer_v2": 2,
    "efficientvim": 4,
    "levit": 2,
    "repvit": 2,
    "swiftformer": 2,
    "volo": 2,
}


def families() -> dict[str, str]:
    """timm's first model of each of its modules, by the module's name."""
    if importlib.util.find_spec("timm") is None:
        return {}
    import timm

    found: dict[str, str] = {}
    for name in timm.list_models():
        found.setdefault(timm.models._registry._model_to_module[name], name)
    return found


def assert_heads(model: torch.nn.Module, classes: int) -> None:
    heads = [model.get_submodule(name) for name in head_names(model)]
    assert [len(head.weight) for head in heads] == [classes] * len(heads)
    assert trained_names(model) == fastest_names(model) == in_heads(model)


# RegNets compute their widths with tensors, so that they cannot be built without their weights: the smallest stands
# for all.
@pytest.mark.parametrize(
    "name", [name for name in models.list_models(module=models) if "regnet" not in name or name.endswith("y_400mf")]
)
def test_torchvisions_heads_alone_are_trained_while_frozen(name):
    options = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = models.get_model(name, num_classes=7, **options)
    assert_heads(model, 7)


@pytest.mark.parametrize("family", families())
def test_timms_heads_alone_are_trained_while_frozen(family):
    import timm

    with torch.device("meta"):
        model = timm.create_model(families()[family], num_classes=7)
    assert_heads(model, 7)
    assert len(head_names(model)) == SEVERAL.get(family, 1)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("levit_128s", 224),
        ("crossvit_9_240", 240),
        ("repvit_m0_9", 64),
        ("efficientvim_m1", 64),
        ("deit_tiny_distilled_patch16_224", 224),
        ("pit_ti_distilled_224", 224),
        ("efficientformer_l1", 224),
        ("efficientformerv2_s0", 224),
        ("swiftformer_xs", 224),
        ("volo_d1_224", 224),
    ],
)
def test_every_head_of_timms_distilled_models_counts_for_the_logits(name, size):
    """A head that the logits do not depend on would make the other tests prove nothing."""
    pytest.importorskip("timm")
    model = build_model(f"timm:{name}", 5, pretrained=False, image_size=size).train()
    trained = trained_names(model)
    model(torch.rand(2, 3, size, size)).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in trained)


BLOCKS = {  # of timm's transformers, as their papers count them; of hybrids those with attention
    "beit_base_patch16_224": 12,
    "botnet26t_256": 3,
    "caformer_s18": 12,
    "cait_xxs24_224": 24 + 2,
    "coat_lite_tiny": 8,
    "coatnet_0_224": 5 + 2,
    "convit_tiny": 12,
    "crossvit_9_240": 12 + 6,
    "davit_tiny": 12,
    "deit_tiny_distilled_patch16_224": 12,
    "edgenext_xx_small": 3,
    "efficientformer_l3": 4,
    "efficientformerv2_s0": 4,
    "efficientvit_b0": 4,
    "eva02_tiny_patch14_224": 12,
    "flexivit_small": 12,
    "gcvit_xxtiny": 12,
    "hiera_tiny_224": 12,
    "levit_128s": 2 + 3 + 4,
    "maxvit_tiny_tf_224": 11,
    "mobilevit_xxs": 9,
    "mvitv2_tiny": 10,
    "naflexvit_base_patch16_gap": 12,
    "nest_tiny": 12,
    "pit_ti_224": 12,
    "pvt_v2_b0": 8,
    "swin_tiny_patch4_window7_224": 12,
    "swinv2_tiny_window8_256": 12,
    "tiny_vit_5m_224": 10,
    "tnt_s_legacy_patch16_224": 12,
    "twins_pcpvt_small": 16,
    "twins_svt_small": 18,
    "visformer_tiny": 8,
    "vit_base_patch16_siglip_224": 12,
    "vit_base_patch16_siglip_gap_224": 12,
    "vit_small_patch14_dinov2": 12,
    "vit_tiny_patch16_224": 12,
    "volo_d1_224": 4 + 14 + 2,
    "xcit_nano_12_p16_224": 12 + 2,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_of_a_transformer_has_a_learning_rate_of_its_own(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    depths = block_depths(model)
    blocks = attention_blocks(model)
    assert len(blocks) == BLOCKS[name]
    for number, block in enumerate(blocks, 1):
        assert {depth for parameter, depth in depths.items() if parameter.startswith(f"{block}.")} == {number}
    heads = in_heads(model)
    assert {depths[parameter] for parameter in heads} == {len(blocks) + 1}
    assert list(depths.values())[0] == 0


@pytest.mark.parametrize(
    "name",
    ["resnet50_clip", "resnest14d", "skresnet18", "convnext_atto", "mixer_s16_224", "poolformer_s12", "ecaresnet26t"],
)
def test_layer_decay_is_refused_for_networks_without_blocks_of_attention(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    with pytest.raises(UserError, match="has no attention blocks"):
        block_depths(model)


@pytest.mark.parametrize("name", ["qwen3_vit_88m_enc", "mobilenetv5_300m_enc"])
def test_encoders_of_timm_are_refused(name):
    pytest.importorskip("timm")
    with torch.device("meta"), pytest.raises(UserError, match="is not a classifier"):
        build_model(f"timm:{name}", 7, pretrained=False)
