"""The numbers of an inspection against ones known by other means: counted by hand, or given by torch.finfo.

Models here are a few layers whose saved tensors, gradients and dtypes can be written down.
"""

import json

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import nn

from ampscope import InspectError, inspect_step, memory, payoff, pictures, ranges
from ampscope.precisions import named_precision
from ampscope.subject import Subject
from ampscope.text import table
from ampscope.tracing import trace_step
from ampscope.words import diary_lines, underflow_lines

CPU = torch.device("cpu")
FP32, BF16, FP16 = (named_precision(name, CPU) for name in ("fp32", "amp-bf16", "amp-fp16"))


class Known(nn.Module):
    """Convolution, BatchNorm, in-place ReLU, softmax, Linear: one of each kind of autocast's lists."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        pooled = self.relu(self.norm(self.conv(images))).mean((2, 3))
        return self.head(torch.softmax(pooled, 1))


@pytest.fixture
def known():
    torch.manual_seed(0)
    return Known(), torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 0, 1])


def subject_of(model, images, labels):
    return Subject(model, (images, labels), lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]))


def trace(model, images, labels, precision):
    """Return the records of one traced step; the model is restored."""
    subject = subject_of(model, images, labels)
    with subject.kept():
        traced = trace_step(subject, precision)
    assert traced.error is None
    kinds = {name: type(module).__name__ if name else "" for name, module in subject.named_modules()}
    return traced.records(kinds)


def ledger(model, images, labels, precision):
    subject = subject_of(model, images, labels)
    with subject.kept():
        return memory.memory_ledger(subject, precision)


def rows_of(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize("precision", [BF16, FP16])
def test_dtypes_are_those_autocast_documents(known, precision):
    rows = trace(*known, precision)
    low = str(precision.dtype).removeprefix("torch.")
    (convolution,) = rows_of(rows, phase="forward", op="convolution")
    assert (convolution["module"], convolution["kind"]) == ("conv", "Conv2d")
    assert convolution["inputs"] == [low] and convolution["output"] == low
    (norm,) = rows_of(rows, phase="forward", op="native_batch_norm")
    assert norm["module"] == "norm" and norm["inputs"] == [low, "float32"] and norm["output"] == low
    (softmax,) = rows_of(rows, phase="forward", op="_softmax")
    assert softmax["module"] == "" and softmax["inputs"] == [low]  # on CUDA's float32 list, not on the CPU's
    (linear,) = rows_of(rows, phase="forward", op="addmm")
    assert linear["module"] == "head" and linear["inputs"] == [low]
    (loss,) = rows_of(rows, phase="loss", op="nll_loss_forward")
    assert loss["inputs"][0] == "float32"
    for op, module in (
        ("convolution_backward", "conv"),
        ("native_batch_norm_backward", "norm"),
        ("threshold_backward", "relu"),
        ("mm", "head"),
        ("nll_loss_backward", ""),
    ):
        assert {row["module"] for row in rows_of(rows, phase="backward", op=op)} == {module}, op


class Copying(nn.Linear):
    def forward(self, images):
        return super().forward(images.to(torch.float32, copy=True))


def test_casts_are_counted_by_hand(known):
    rows = trace(*known, BF16)

    def casts(phase, module):
        return sum(row["calls"] for row in rows_of(rows, phase=phase, module=module) if row["cast"])

    assert casts("forward", "conv") == 3  # images, weight, bias
    assert casts("forward", "head") == 2  # weight and bias: its input is in 16 bits already
    assert casts("forward", "") == 0
    assert casts("loss", "") == 1  # cross_entropy wants float32
    assert casts("backward", "") == 1  # and back again
    assert casts("backward", "conv") == 2  # weight and bias; images need no gradient
    assert casts("backward", "head") == 2
    images = 4 * 3 * 6 * 6
    weight = 4 * 3 * 3 * 3
    bias = 4
    convolution = [row for row in rows if row["module"] == "conv"]
    moved = payoff.cast_cost(None, convolution, CPU)
    assert moved["bytes"] == (images + 2 * weight + 2 * bias) * (4 + 2) and moved["seconds"] > 0
    assert moved["casts"] == {"forward": 3, "backward": 2}
    rows = trace(Copying(4, 2), torch.randn(3, 4), torch.tensor([0, 1, 0]), FP32)
    (copied,) = rows_of(rows, phase="forward", op="_to_copy")
    assert copied["cast"] is None  # a copy of the same type


def test_fp32_has_no_casts_and_the_model_is_left_alone(known):
    model, images, labels = known
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = trace(model, images, labels, FP32)
    assert not any(row["cast"] for row in rows)
    assert {row["output"] for row in rows if "float" in row["output"]} == {"float32"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.conv._forward_hooks and not model.conv._forward_pre_hooks


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_ledger_counted_by_hand():
    batch = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0])
    fp32, bf16 = (ledger(two_layers(), *batch, precision) for precision in (FP32, BF16))
    for row in (fp32, bf16):
        assert row["parameters"] == row["gradients"] == 4 * (12 + 3 + 6 + 2)
        assert row["optimizer_state"] == 2 * row["parameters"] + 4 * 4  # two moments, a step count for each of four
        assert row["batch"] == 4 * 5 * 4 + 8 * 5 and row["buffers"] == 0
    # kept: ReLU's output, which the second layer shares, log_softmax's output, and the sum of the labels' weights
    assert fp32["activations"] == 4 * 15 + 4 * 10 + 4 and fp32["weight_copies"] == 0
    # the same with ReLU's output in 16 bits, and the images cast to them; of the weights only the second is kept,
    # because nothing wants a gradient of the images
    assert bf16["activations"] == 2 * 15 + 4 * 10 + 4 + 2 * 20 and bf16["weight_copies"] == 2 * 6
    row = ledger(nn.Sequential(nn.BatchNorm1d(4)), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), FP32)
    assert row["buffers"] == 2 * 4 * 4 + 8
    # mean and deviation of the batch, log_softmax's output, the sum of the labels' weights; the input is the batch
    assert row["activations"] == 2 * 16 + 4 * 20 + 4


def test_peak_of_allocations_is_the_largest_sum():
    def function():
        first = torch.empty(1 << 20)  # 4 MB, freed before the next two
        del first
        return torch.empty(1 << 19), torch.empty(1 << 20)

    assert memory.peak_of_allocations(function) == 6 << 20


class Handmade(nn.Module):
    """Makes `values` the gradient of its weight, whatever the images: the loss is linear in it."""

    def __init__(self, values):
        super().__init__()
        self.layer = nn.Linear(len(values), 1, bias=False)
        self.values = values

    def forward(self, images):
        return self.layer(self.values.expand(len(images), -1)).expand(-1, 1)


def test_underflow_is_counted_of_the_gradients_times_the_scale():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(4000, generator=generator) * 50 - 40
    edges = torch.tensor([2.0**-25, 2.0**-24, 2.0**-14])
    values = torch.cat([torch.exp2(exponents), -torch.exp2(exponents), torch.zeros(100), edges])
    model = Handmade(values)
    # a loss whose gradient with respect to the logits is 1 in one row, so that the weight's gradient is `values`
    subject = Subject(model, torch.zeros(1, 3), lambda outputs, batch: outputs[0, 0])
    with subject.kept():
        found = ranges.measure_ranges(subject, scaler_scale=2.0**20)
    assert found["scales"] == [1, 2**8, 2**16, 2**20]
    (row,) = [row for row in found["layers"] if row["group"] == "parameter"]
    nonzero = values[values != 0]
    assert row["name"] == "layer.weight" and row["through_float16"]
    assert row["values"] == len(values) and row["nonzero"] == len(nonzero)
    for scale in found["scales"]:
        assert row["by_scale"][f"{scale:g}"] == by_casting(nonzero, scale, torch.float16), scale
    expected = np.unique(np.floor(np.log2(nonzero.abs().double().numpy())), return_counts=True)
    counts = found["histogram"]["parameter"]
    assert counts == dict(zip(*(array.astype(int).tolist() for array in expected), strict=True))


def by_casting(values, scale, dtype):
    """How many values times the scale become zero, subnormal or too large, by a cast."""
    info = torch.finfo(dtype)
    edge = ranges.limits(dtype)[2] if dtype is torch.float8_e4m3fn else torch.inf  # where it has no infinity
    rounded = (values * scale).to(dtype).float().abs()
    return {
        "zero": int((rounded == 0).sum()),
        "subnormal": int(((rounded > 0) & (rounded < info.tiny)).sum()),
        "overflow": int((~rounded.isfinite() | ((rounded == info.max) & ((values * scale).abs() > edge))).sum()),
    }


@pytest.mark.parametrize("name, dtype", ranges.FORMATS.items())
@pytest.mark.parametrize("scale", [1.0, 2.0**8])
def test_fates_are_what_casting_does(name, dtype, scale):
    """Every power of two in reach, its neighbours, the halves between a format's numbers and the ends of its range."""
    info = torch.finfo(dtype)
    grid = torch.exp2(torch.arange(-140, 127, dtype=torch.float64)).float()
    ends = torch.tensor([info.max * factor for factor in (1, 1.01, 1.03, 1.0357, 1.036, 1.07)] + [info.tiny]).float()
    values = torch.cat([grid, 1.5 * grid, ends, torch.nextafter(ends, torch.zeros(())), -grid]) / scale
    values = values[(values != 0) & values.isfinite() & (values * scale).isfinite()]
    fates = ranges.Fates([scale])
    fates.add(torch.cat([values, torch.zeros(7)]))
    expected = by_casting(values, scale, dtype)
    assert fates.formats()[name][f"{scale:g}"] == expected and fates.values == len(values) + 7


def test_nothing_measured_is_not_zero():
    """A head that begins at zero sends no gradient back: the map says nothing about the layers before it."""
    model = two_layers()
    nn.init.zeros_(model[2].weight)
    subject = subject_of(model, torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0]))
    with subject.kept():
        found = ranges.measure_ranges(subject)
    rows = {row["name"]: row for row in found["layers"] if row["group"] == "parameter"}
    assert rows["0.weight"]["nonzero"] == 0 and rows["0.weight"]["largest"] is None
    assert set(rows["0.weight"]["by_scale"].values()) == {None}
    assert rows["2.weight"]["by_scale"]["1"] == {"zero": 0, "subnormal": 0, "overflow": 0}
    lines = underflow_lines(found)
    (line,) = [line.split() for line in lines if line.split()[:1] == ["0"]]
    assert line[1:4] == ["–", "–", "–"]
    assert any("nothing was measured there" in line for line in lines)


def test_underflow_map_covers_activations_and_marks_what_stays_fp32(known):
    subject = subject_of(*known)
    with subject.kept():
        found = ranges.measure_ranges(subject)
    through = {row["name"]: row["through_float16"] for row in found["layers"] if row["group"] == "parameter"}
    assert through == {
        "conv.weight": True,
        "conv.bias": True,
        "norm.weight": False,
        "norm.bias": False,
        "head.weight": True,
        "head.bias": True,
    }
    outputs = {row["name"]: row for row in found["layers"] if row["group"] == "activation"}
    assert set(outputs) == {"conv", "norm", "relu", "head"}  # the model puts out what its head does
    assert outputs["conv"]["values"] == 4 * 4 * 4 * 4
    model, images, labels = known
    logits = model.train()(images)
    logits.retain_grad()
    nn.functional.cross_entropy(logits, labels).backward()
    assert max(found["histogram"]["activation"]) == int(np.floor(np.log2(logits.grad.abs().max().item())))


def epoch(number, scale, *skips):
    """Return a line of metrics; each skip is (update, parameter, scale)."""
    told = [dict(zip(("update", "parameter", "scale"), skip, strict=True)) for skip in skips]
    return {"epoch": number, "updates": 10 * number, "loss_scale": scale, "skipped_updates": len(skips), "skips": told}


METRICS = [
    epoch(1, 16384.0, (1, "conv1.weight", 65536.0), (2, "fc.weight", 32768.0)),
    epoch(2, 16384.0),
    epoch(3, 16384.0),
    epoch(4, 0.5, (37, "bn1.bias", 1.0)),
]


def test_diary_tells_scales_skips_and_parameters():
    lines = diary_lines(METRICS)
    cells = [line.split() for line in lines]
    assert ["1", "16,384", "2"] in cells
    assert ["2", "to", "3", "16,384", "0"] in cells
    assert ["4", "0.5", "1"] in cells
    assert "  3 skipped" in lines
    for words in (("1 (epoch 1)", "65,536", "conv1.weight"), ("37 (epoch 4)", "bn1.bias")):
        assert any(all(word in line for word in words) for line in lines), words
    lines = diary_lines([{"epoch": 1, "loss_scale": 1.0, "skipped_updates": 0, "skips": []}])
    assert "no scaler" in lines[-1]


def test_diary_is_drawn_update_by_update(tmp_path, monkeypatch):
    def step(_axes, updates, scales, **_look):
        drawn.extend(zip(updates, scales, strict=True))

    drawn = []
    monkeypatch.setattr(Axes, "step", step)
    third = epoch(3, 8192.0, (30, "fc.weight", 16384.0))  # a skip at an end
    pictures.diary_picture([*METRICS[:2], third], tmp_path / "scaler.png")
    assert drawn == [(1, 65536), (2, 32768), (11, 16384), (21, 16384), (30, 16384), (31, 8192)]


def report_on(model, images, labels, precisions, **options):
    return inspect_step(
        model,
        (images, labels),
        lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        precisions=precisions,
        **options,
    )


def test_a_report_writes_everything_and_fits_the_terminal(known, tmp_path):
    out = tmp_path / "deep" / "out"
    report = report_on(*known, ["fp32", "amp-bf16"], metrics=METRICS, scaler_scale=0.5)
    report.write(out)
    text = report.text()
    assert all(len(line) <= 80 for line in text.splitlines()), max(text.splitlines(), key=len)
    for title in ("1. What ran", "2. Memory", "3. Underflow", "4. Scaler", "5. Activation", "8. Will it pay?"):
        assert title in text
    drawn = {"underflow.png", "memory.png", "scaler.png", "activations.png"}
    assert {path.name for path in out.iterdir()} == {"inspect.json", "inspect.html", *drawn}
    assert all((out / name).stat().st_size > 20_000 for name in drawn)
    content = json.loads((out / "inspect.json").read_text())
    assert set(content["dtypes"]) == {"fp32", "amp-bf16"}
    assert content["underflow"]["scaler_scale"] == 0.5
    assert [row["precision"] for row in content["memory"]] == ["fp32", "amp-bf16"]
    full = report_on(*known, ["amp-bf16"], speed=False).text(full=True)
    assert "detach" in full and "detach" not in text and "No run was named" in full
    assert all(len(line) <= 80 for line in full.splitlines())
    (tmp_path / "file").write_text("")
    with pytest.raises(InspectError, match="another folder"):
        report.write(tmp_path / "file")


@pytest.mark.parametrize(
    "align, rows, lines",
    [
        ("<>", [["a", "bb"], ["ccc", "1"]], ["  a    bb", "  ccc   1"]),
        ("<>", [["", "b"], ["a heading of its own"], ["c", "d"]], ["     b", "a heading of its own", "  c  d"]),
        ("<<", [["a", "b" * 90]], ["  a  " + "b" * 74 + "…"]),
    ],
)
def test_tables_are_set_by_their_longest_cells(align, rows, lines):
    assert table(align, rows) == lines
