"""The error of each layer against known ones, the floor of mere rounding, and the layers to keep in float32."""

import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from whole_step import CPU_BF16, written

from ampscope import InspectError, cli, keep_float32, layer_errors
from ampscope.float32_layers import put_back

BATCH = 64


class Centre(nn.Module):
    """Adds 100 in a matrix product and takes it away again: in bfloat16 a third of the signal is lost."""

    def forward(self, inputs):
        weight = torch.eye(inputs.shape[1])
        return nn.functional.linear(inputs, weight, weight.new_full((len(weight),), 100.0)) - 100.0


class Twice(nn.Module):
    """Calls one module twice, and another one inside a checkpoint."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(32, 32)
        self.inside = nn.Sequential(nn.Linear(32, 32), nn.GELU())

    def forward(self, inputs):
        hidden = self.shared(self.shared(inputs).relu())
        return {"logits": checkpoint(self.inside, hidden, use_reentrant=False), "hidden": hidden}


def network(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), *middle, nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 32, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)


def loss(outputs, batch):
    outputs = outputs["logits"] if isinstance(outputs, dict) else outputs
    return nn.functional.cross_entropy(outputs, batch[1] % outputs.shape[1])


def rows_of(found, precision="amp-bf16"):
    return {(row["name"], row["call"]): row for row in found.content["precisions"][precision]["rows"]}


def test_the_layer_that_loses_the_precision_is_named_and_kept():
    model = network(Centre())
    found = layer_errors(model, batch(), loss, precisions=["amp-bf16", "amp-fp16"], find=True)
    for name, own in (("amp-bf16", 0.2), ("amp-fp16", 0.02)):
        part = found.content["precisions"][name]
        assert part["most"] == part["first"] == "2" and part["keep"] == ["2"]
        assert rows_of(found, name)["2", 0]["own"] > own and part["left"] < 0.1 * part["whole"]
        assert "keep_float32(model, '2')" in part["verdict"]
    assert type(model[2]) is Centre and json.dumps(found.content)
    assert all(len(line) <= 80 for line in found.text().splitlines())


@pytest.mark.parametrize("model", [network(), network(nn.LayerNorm(32)), Twice(), network(nn.Dropout(0.5))])
@pytest.mark.parametrize("precision", ["amp-bf16", "amp-fp16"])
def test_mere_rounding_is_no_fault(model, precision):
    found = layer_errors(model, batch(), loss, precisions=[precision])
    part = found.content["precisions"][precision]
    assert part["first"] is None and part["most"] is None and part["back"] is None and "is rounding" in found.text()
    assert all(row["output"] < 0.02 for row in part["rows"])


class Summed(torch.autograd.Function):
    """A scale whose gradient is summed in bfloat16, as that of LayerNorm on CPUs is."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(inputs, weight)
        return inputs * weight.to(inputs.dtype)

    @staticmethod
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensors
        total = torch.zeros_like(weight, dtype=inputs.dtype)
        for row in gradient * inputs:
            total = total + row
        return gradient * weight.to(gradient.dtype), total.to(weight.dtype)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, inputs):
        return Summed.apply(inputs, self.weight)


def test_a_gradient_that_is_lost_in_its_sum_is_named_where_outputs_are_right():
    inputs, labels = torch.randn(2048, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(2048).long()
    part = layer_errors(network(Scale()), (inputs, labels), loss, precisions=["amp-bf16"]).content["precisions"][
        "amp-bf16"
    ]
    assert (part["first"], part["most"], part["back"]) == (None, None, "2")
    assert "The gradient of the weights of 2 (Scale) is off by" in part["verdict"]


def test_errors_are_those_of_two_runs_by_hand():
    model = network()
    inputs, _ = batch()
    found = layer_errors(model, batch(), loss, precisions=["amp-bf16"])
    rows = rows_of(found)
    with torch.autocast(**CPU_BF16):
        low = model[0](inputs)
    true = model[0](inputs)
    assert rows["0", 0]["output"] == pytest.approx(((low.float() - true).norm() / true.norm()).item(), rel=1e-4)
    assert rows["0", 0]["own"] == pytest.approx(rows["0", 0]["output"], rel=1e-4)
    assert found.content["reference"] == "float64"


@pytest.mark.parametrize("model", [network(nn.Dropout(0.5)), network(Centre())], ids=["random", "names float32"])
def test_a_step_that_float64_would_change_is_compared_with_float32(model):
    values = [parameter.data_ptr() for parameter in model.parameters()]
    assert layer_errors(model, batch(), loss, precisions=["amp-bf16"]).content["reference"] == "float32"
    assert values == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_float64_sees_what_float32_loses():
    """A sum over 1e8 that is taken away again: float32 is as wrong as the type of 16 bits."""

    class Lost(nn.Module):
        def forward(self, inputs):
            return inputs + 1e8 - 1e8

    rows = rows_of(layer_errors(network(Lost()), batch(), loss, precisions=["amp-bf16"]))
    assert rows["2", 0]["own"] > 0.5


def test_modules_called_twice_and_checkpointed_ones_have_their_rows():
    rows = rows_of(layer_errors(Twice(), batch(), loss, precisions=["amp-bf16"]))
    assert [key for key in rows if key[0] == "inside.0"] == [("inside.0", 0)], "nothing is computed twice"
    assert [key for key in rows if key[0] == "shared"] == [("shared", 0), ("shared", 1)]
    assert rows["inside.0", 0]["output"] > 0 and rows["shared", 0]["gradient"] > 0


def test_models_are_put_back():
    model = network(nn.BatchNorm1d(32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer_errors(model, batch(), loss, precisions=["amp-bf16"], find=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_kept_layer_computes_in_float32_and_gives_back_the_type_of_its_input():
    model = network()
    names = keep_float32(model, "2,4")
    seen = []
    model[2].register_forward_hook(lambda module, given, out: seen.append((given[0].dtype, out.dtype)))
    keys = list(model.state_dict())
    with torch.autocast(**CPU_BF16):
        hidden = model[1](model[0](batch()[0]))
        kept = model[2](hidden)
    assert seen == [(torch.bfloat16, torch.bfloat16)] and names == ["2", "4"]
    assert torch.equal(kept, nn.functional.linear(hidden.float(), model[2].weight, model[2].bias).bfloat16())
    assert isinstance(model[2], nn.Linear) and list(model.state_dict()) == keys
    put_back(model, names)
    assert type(model[2]) is nn.Linear
    with pytest.raises(InspectError, match="no module is called 'head'"):
        keep_float32(model, "head")


def test_it_is_a_command(tmp_path, capsys):
    text = """
    import torch
    from torch import nn
    def make():
        return nn.Linear(8, 4), torch.randn(6, 8), lambda outputs, batch: outputs.square().mean()
    """
    assert cli.main(["inspect", written(tmp_path, text), "--find_layers", f"--out={tmp_path / 'out'}"]) == 0
    assert "is rounding" in capsys.readouterr().out and (tmp_path / "out" / "layers.png").exists()
    assert json.loads((tmp_path / "out" / "layers.json").read_text())["reference"] == "float64"
    assert cli.main(["inspect", written(tmp_path, text), "--layers", "--precisions=fp32"]) == 2
    assert "16 bits" in capsys.readouterr().err
