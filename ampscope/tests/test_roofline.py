"""Operators counted, rates measured and bounds computed, against numbers worked out by hand.

Run it alone: pytest ampscope/tests/test_roofline.py
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ampscope import roofline
from ampscope.roofline import OTHER, Operator, count_step, group_of

CPU = torch.device("cpu")


GROUPS = {
    "convolutions": "aten.convolution.default aten::convolution_backward aten::mkldnn_convolution",
    "matrix products": "aten.addmm.default aten.mm.default aten._scaled_dot_product_flash_attention.default",
    "normalization": "aten.native_batch_norm_backward.default aten::native_layer_norm",
    "optimizer": "aten.linalg_vector_norm.default aten._foreach_norm.Scalar aten._fused_adam_.default",
    "activations and sums": "aten.threshold_backward.default aten.add_.Tensor",
    "pooling": "aten.max_pool2d_with_indices.default",
    "casts and copies": "aten._to_copy.default aten::copy_",
    OTHER: "aten.argmax.default",
}


def test_operators_are_counted_in_their_groups():
    assert all(group_of(operator) == group for group, names in GROUPS.items() for operator in names.split())


def test_a_product_is_counted_by_hand():
    """[2, 3] by [3, 5] forward; backward the gradients of both factors; bytes of three tensors each, 4 a number."""
    left = torch.randn(2, 3, requires_grad=True)
    right = torch.randn(3, 5, requires_grad=True)
    products = [one for one in count_step(lambda: (left @ right).sum().backward(), CPU) if one.flops]
    assert [one.flops for one in products] == 3 * [2 * 2 * 3 * 5]
    assert products[0].bytes == 4 * (6 + 15 + 10) and products[0].dtype == "float32"
    # The gradient of a sum is one number, broadcast: it is in memory once.
    assert sorted(one.bytes for one in products[1:]) == sorted([4 * (1 + 15 + 6), 4 * (6 + 1 + 15)])


def test_views_and_new_memory_move_nothing():
    values = torch.randn(8, 8)

    def step():
        torch.empty(1000).view(10, 100).t().detach()
        values.reshape(64).unsqueeze(0)

    assert count_step(step, CPU) == []


def test_autocast_is_seen_from_below():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    images = torch.randn(2, 3, 8, 8)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            model(images).float().sum().backward()

    found = count_step(step, CPU)
    convolutions = [one for one in found if one.group == "convolutions"]
    assert {one.dtype for one in convolutions} == {"bfloat16"} and len(convolutions) == 2
    assert convolutions[0].flops == 2 * 2 * 4 * 6 * 6 * 3 * 9
    # Its weights (4 x 3 x 3 x 3), images, bias and what it puts out, two bytes each.
    assert convolutions[0].bytes == 2 * (4 * 27 + 2 * 3 * 64 + 4 + 2 * 4 * 36)
    assert {"normalization", "activations and sums", "casts and copies"} <= {one.group for one in found}


def test_a_count_that_differs_from_torchs_own_is_an_error(monkeypatch):
    monkeypatch.setattr(roofline, "flop_registry", {})
    with pytest.raises(RuntimeError, match="FlopCounterMode"):
        count_step(lambda: torch.randn(2, 3) @ torch.randn(3, 2), CPU)


OPERATORS = [
    Operator("aten.convolution.default", "convolutions", 1000, 10, "bfloat16"),
    Operator("aten.convolution.default", "convolutions", 100, 80, "bfloat16"),
    Operator("aten.native_batch_norm.default", "normalization", 0, 60, "bfloat16"),
]


def test_the_bound_is_the_longer_of_arithmetic_and_traffic():
    found = roofline.roofline(OPERATORS, rates={"float32": 10.0, "bfloat16": 100.0}, bandwidth=10.0)
    # 1000/100 against 10/10: 10 s. 100/100 against 80/10: 8 s. 60/10: 6 s.
    assert found["bound_seconds"] == 24 and found["flops"] == 1100 and found["bytes"] == 150
    convolutions, norm = found["groups"]["convolutions"], found["groups"]["normalization"]
    assert convolutions["bound_seconds"] == 18 and convolutions["limit"] == "arithmetic" and convolutions["calls"] == 2
    assert norm["bound_seconds"] == 6 and norm["limit"] == "memory" and norm["share_of_bound"] == 0.25
    assert list(found["groups"]) == ["convolutions", "normalization"] and norm["measured_seconds"] is None


def test_a_type_without_a_rate_of_its_own_counts_as_float32():
    found = roofline.roofline(OPERATORS[:1], rates={"float32": 10.0}, bandwidth=10.0)
    assert found["bound_seconds"] == 100


def test_rates_of_this_machine():
    rate = roofline.matrix_rate(CPU, torch.float32, size=64, repeats=2)
    bandwidth = roofline.copy_bandwidth(CPU, megabytes=1, repeats=2)
    assert 1e6 < rate < 1e16 and 1e6 < bandwidth < 1e14


def test_profiled_seconds_by_group():
    events = [
        SimpleNamespace(key="aten::mkldnn_convolution", self_cpu_time_total=2e6, self_device_time_total=1e6),
        SimpleNamespace(key="aten::convolution_backward", self_cpu_time_total=3e6, self_device_time_total=4e6),
        SimpleNamespace(key="aten::native_batch_norm", self_cpu_time_total=1e6, self_device_time_total=2e6),
    ]
    assert roofline.measured_groups(events, cuda=False) == {"convolutions": 5.0, "normalization": 1.0}
    assert roofline.measured_groups(events, cuda=True) == {"convolutions": 5.0, "normalization": 2.0}
