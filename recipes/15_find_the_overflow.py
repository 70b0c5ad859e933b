"""Recipe 15: find the layer that overflows.

Rule: when the scale keeps falling, look for the first value that is not finite, in the order of execution:
forward hooks for activations, gradient hooks for the way back. Then mend that layer.
Why: an inf spreads. The loss is NaN, every weight's gradient is NaN, and so neither names the culprit. A lower
scale cures an overflow on the way back, never one on the way forward.
When it is broken: every update is skipped and the scale falls through 1 towards 0; nothing raises.
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional

QUESTION = """A layer overflows in the forward pass of a float16 network. The scale begins at 65536.
After how many skipped updates has the scaler found a scale that works?"""


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, values):
        return functional.relu(values + self.conv2(functional.relu(self.conv1(values))))


class RootMeanSquare(nn.Module):
    """Pools (N, C, H, W) to (N, C). The square of 300 is above 65504, the largest float16."""

    def __init__(self, in_float32=False):
        super().__init__()
        self.in_float32 = in_float32

    def forward(self, values):
        with torch.amp.autocast(values.device.type, enabled=not self.in_float32):
            values = values.float() if self.in_float32 else values
            return (values * values).mean((2, 3)).add(1e-6).sqrt()


class Net(nn.Module):
    """A small residual network; a `loud` one has activations in the hundreds, as big networks do."""

    def __init__(self, loud=False, pool_in_float32=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(8) for _ in range(3)])
        self.pool = RootMeanSquare(pool_in_float32)
        self.head = nn.Linear(8, 6)
        if loud:
            self.stem.weight.data.mul_(500)

    def forward(self, images):
        return self.head(self.pool(self.blocks(functional.relu(self.stem(images)))))


def watch(model):
    """Hooks on each layer; returns the list they fill: (where, layer, largest size, finite), in order."""
    seen = []

    def note(where, name, values):
        seen.append((where, name, values.detach().abs().max().item(), values.isfinite().all().item()))

    def attach(name, module):
        def after_forward(module, args, output):
            note("forward", name, output)
            if output.requires_grad:
                output.register_hook(lambda gradient: note("backward", name, gradient))

        module.register_forward_hook(after_forward)

    for name, module in model.named_modules():
        if not list(module.children()):
            attach(name, module)
    return seen


def one_pass(device, dtype, scale, **options):
    model = Net(**options).to(device)
    seen = watch(model)
    images = torch.randn(12, 3, 8, 8).to(device)
    labels = torch.arange(12, device=device) % 6
    with torch.amp.autocast(device, dtype=dtype):
        loss = functional.cross_entropy(model(images), labels)
    (loss * scale).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return seen, loss.item(), sum(not gradient.isfinite().all() for gradient in gradients), len(gradients)


def report(title, seen, loss, bad, count):
    first = next((entry for entry in seen if not entry[3]), None)
    print(f"  {title}: loss {loss:.4g}, {bad} of {count} weight gradients not finite")
    print("    first value that is not finite: " + (f"{first[0]}, {first[1]}" if first else "none"))
    return first[:2] if first else None


def scale_after(device, updates, loud):
    """Return the loss scale after some updates: all that is visible without hooks."""
    model = Net(loud).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device)
    images = torch.randn(12, 3, 8, 8).to(device)
    labels = torch.arange(12, device=device) % 6
    for _ in range(updates):
        optimizer.zero_grad()
        with torch.amp.autocast(device, dtype=torch.float16):
            loss = functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale()


def main(device):
    half = torch.float16
    print(f"1. Without hooks: the scale after 20 updates, beginning at 65536 ({device})")
    scales = [scale_after(device, 20, loud) for loud in (False, True)]
    print(f"  healthy network {scales[0]:g}, loud network {scales[1]:g} (below 1: diverged, all 20 skipped)")
    assert scales[0] > 1024 and scales[1] == 65536 / 2**20, (
        "the healthy network lost its scale, or the loud one did not skip all 20 updates"
    )

    print("2. With hooks: what every layer of the loud network gives")
    seen, *summary = one_pass(device, half, 1024.0, loud=True)
    for where, name, size, finite in seen:
        if where == "forward":
            print(f"  {name:<16} largest {size:>10.4g}{'' if finite else '   <- not finite'}")
    assert report("float16", seen, *summary) == ("forward", "pool") and summary[1] == summary[2], (
        "the first value that is not finite is not the pool's, or some gradient of a weight is finite"
    )

    print("3. An overflow on the way back: the network is healthy, the scale too high")
    assert report("scale 2**28", *one_pass(device, half, 2.0**28)) == ("backward", "head"), (
        "the first value that is not finite is not the head's on the way back"
    )
    assert report("scale 2**10", *one_pass(device, half, 2.0**10)) is None, (
        "a scale of 2**10 overflows in the healthy network"
    )

    print("4. Two cures for the loud network")
    assert report("bfloat16", *one_pass(device, torch.bfloat16, 1.0, loud=True)) is None, (
        "the loud network overflows in bfloat16"
    )
    cured = one_pass(device, half, 64.0, loud=True, pool_in_float32=True)
    assert report("float16, pool in float32", *cured) is None, (
        "the loud network overflows in float16 with its pool in float32"
    )
    print("RULE: hooks name the first layer that is not finite; a low scale does not.")
    return f"never: after 20 it stands at {scales[1]:g}, and every update was skipped"


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
