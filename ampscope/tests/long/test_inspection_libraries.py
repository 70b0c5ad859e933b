"""`inspect_step` on small models of transformers, torchvision and timm with random weights: no false alarm."""

import pytest
import torch
from torch import nn

from ampscope import inspect_step

functional = nn.functional
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 128,
}
ONE_LAYER = {
    "d_model": 32,
    "vocab_size": 128,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
IDS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
LANGUAGE = {"input_ids": IDS, "labels": IDS}
TEXT = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
IMAGE = {
    "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([0, 1]),
}

TRANSFORMERS = {
    "BertForMaskedLM": ("BertConfig", SIZES, LANGUAGE),
    "BertForSequenceClassification": ("BertConfig", SIZES, TEXT),
    "RobertaForSequenceClassification": ("RobertaConfig", SIZES, TEXT),
    "ElectraForSequenceClassification": ("ElectraConfig", SIZES | {"embedding_size": 32}, TEXT),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 128, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        TEXT,
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {
            "vocab_size": 128,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        LANGUAGE,
    ),
    "BartForConditionalGeneration": ("BartConfig", ONE_LAYER | {"max_position_embeddings": 64}, LANGUAGE),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        ONE_LAYER
        | {
            "max_source_positions": 50,
            "num_mel_bins": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        {"input_features": torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(0)), "labels": IDS},
    ),
    "GPT2LMHeadModel": ("GPT2Config", {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 128}, LANGUAGE),
    "LlamaForCausalLM": ("LlamaConfig", SIZES, LANGUAGE),
    "Qwen2ForCausalLM": ("Qwen2Config", SIZES | {"num_key_value_heads": 2}, LANGUAGE),
    "MixtralForCausalLM": (
        "MixtralConfig",
        SIZES | {"num_key_value_heads": 4, "num_local_experts": 2, "num_experts_per_tok": 2},
        LANGUAGE,
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        LANGUAGE,
    ),
    "ViTForImageClassification": ("ViTConfig", VIT, IMAGE),
    "SwinForImageClassification": (
        "SwinConfig",
        {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        IMAGE,
    ),
}
TORCHVISION = [
    "resnet18",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "densenet121",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "regnet_y_400mf",
    "convnext_tiny",
    "mnasnet0_5",
]
TIMM = [
    "test_vit",
    "test_vit2",
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_mambaout",
    "test_byobnet",
    "resnet10t",
]


def cross_entropy(outputs, batch):
    return functional.cross_entropy(outputs, batch[1])


def sound(model, batch, loss=None):
    report = inspect_step(model.train(), batch, loss, speed=False)
    assert report.ok, [(finding.rule, str(finding.place), finding.message) for finding in report.findings]
    assert report.content["precisions"]["amp-bf16"]["error"] is None
    assert len(report.text()) > 1000


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_is_sound(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config, options, batch = TRANSFORMERS[name]
    sound(getattr(transformers, name)(getattr(transformers, config)(**options)), batch)


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_model_of_torchvision_is_sound(name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None, num_classes=8)
    sound(model, (torch.randn(2, 3, 64, 64), torch.tensor([0, 1])), cross_entropy)


@pytest.mark.parametrize("name", TIMM)
def test_a_model_of_timm_is_sound(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = {"img_size": 64} if "vit" in name else {}
    model = timm.create_model(name, num_classes=8, **size)
    sound(model, (torch.randn(2, 3, 64, 64), torch.tensor([0, 1])), cross_entropy)
