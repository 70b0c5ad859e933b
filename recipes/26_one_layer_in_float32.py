"""Recipe 26: one layer in float32.

Rule: measure the error of each layer before you keep one in float32, and keep the one that makes the error.
Why: a layer makes its own rounding errors and passes on those of the layers before it. The error of its output, with
the inputs that it has in float32, is its own. Keep that layer in float32, and its neighbours stay in 16 bits.
When it is broken: the last layer, whose error is the largest, gets the float32, and nothing changes, because it only
passes on what an earlier one has lost. Or the whole network does, and the speed is gone.
"""

import argparse
import sys

import torch
from torch import nn

QUESTION = """Six layers run in bfloat16; one of them subtracts two large numbers that are nearly equal. Kept in float32
alone, by how much does that layer reduce the error of the output: twice, ten times, a hundred times?"""


class Centre(nn.Module):
    """Subtracts an offset that an earlier layer has added: float32 keeps 24 bits of the sum, bfloat16 8."""

    offset = 100.0

    def forward(self, inputs):
        weight = torch.eye(inputs.shape[1], device=inputs.device)
        shifted = nn.functional.linear(inputs, weight, weight.new_full((len(weight),), self.offset))
        return shifted - self.offset


class Float32(nn.Module):
    """Runs a module in float32, whatever autocast does around it; its output has its input's type."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, inputs):
        with torch.amp.autocast(inputs.device.type, enabled=False):  # else the cast below would be undone
            return self.module(inputs.float()).to(inputs.dtype)


def make(device):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.Tanh(), Centre(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)]
    return nn.Sequential(*layers).to(device)


def outputs_of(model, inputs, dtype):
    """Return the input and the output of each layer, by its name."""
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, given, out, name=name: seen.__setitem__(name, (given[0], out)))
        for name, layer in model.named_children()
    ]
    with torch.no_grad(), torch.amp.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
        model(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def relative(value, true):
    return ((value.float() - true).norm() / true.norm()).item()


def own_error(layer, inputs, true, dtype):
    """Return the error of one layer alone, given the inputs that it has in float32."""
    with torch.no_grad(), torch.amp.autocast(inputs.device.type, dtype=dtype):
        return relative(layer(inputs), true)


def main(device, dtype=torch.bfloat16):
    model = make(device)
    inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).to(device)
    true = outputs_of(model, inputs, torch.float32)
    low = outputs_of(model, inputs, dtype)
    print(f"1. The relative error of each layer's output in {str(dtype)[6:]} ({device})")
    print("  layer         as it runs   its own")
    own = {}
    for name, layer in model.named_children():
        own[name] = own_error(layer, *true[name], dtype)
        print(f"  {name} {type(layer).__name__:<10}{relative(low[name][1], true[name][1]):10.2%}{own[name]:10.2%}")
    culprit = max(own, key=own.get)
    last = list(own)[-1]
    assert isinstance(model[int(culprit)], Centre), "another layer than the one that subtracts makes the error"
    assert relative(low[last][1], true[last][1]) > 10 * own[last], "the last layer does not merely pass it on"

    print("2. One layer in float32")
    errors = {"none": relative(low[last][1], true[last][1])}
    for name in own:
        changed = make(device)
        changed[int(name)] = Float32(changed[int(name)])
        found = outputs_of(changed, inputs, dtype)
        errors[name] = relative(found[last][1], true[last][1])
    for name, error in errors.items():
        kind = "" if name == "none" else type(model[int(name)]).__name__
        print(f"  {name:<5}{kind:<10}error of the output {error:8.3%}")
    gain = errors["none"] / errors[culprit]
    others = min(errors[name] for name in own if name != culprit)
    assert gain > 10 and others > 0.5 * errors["none"], "the culprit does not bring most of it, or another layer does"
    print("RULE: keep in float32 the layer whose own error is the largest, and no other.")
    return f"{gain:.0f} times; the other layers, one by one, by {errors['none'] / others:.1f} at most"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quiz", action="store_true", help="ask a question first, then run and answer it")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; leave --device out to run on the CPU")
    if args.quiz:
        print(f"{QUESTION}\nYour guess: ", end="", flush=True)
        guess = sys.stdin.readline().strip() or "nothing"
        print()
    answer = main(args.device)
    if args.quiz:
        print(f"You guessed: {guess}\nMeasured:    {answer}")
