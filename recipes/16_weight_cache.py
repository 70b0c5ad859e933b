"""Recipe 16: autocast's weight cache.

Rule: one autocast region for each forward pass; a pass under no_grad (a teacher, a sampler, a validation) gets a
region of its own.
Why: autocast casts each weight once in a region and keeps the 16-bit copy until the region ends. A copy that was
made under no_grad knows nothing of the weight; versions of PyTorch with a bug use it for training, too.
When it is broken: nothing fails. The weights get no gradient, the biases may still learn, the loss falls a little.
Source: https://github.com/pytorch/pytorch/issues/112583
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

QUESTION = """A float32 layer runs three times in one autocast region: twice under no_grad, once with gradients.
How many times is its weight cast to 16 bits?"""


class CountCasts(TorchDispatchMode):
    """Counts how often a tensor of the weight's shape is cast."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.casts = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.casts += 1
        return operator(*args, **(kwargs or {}))


def make_parts(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 6)).to(device)
    images = torch.randn(48, 64).to(device)
    labels = torch.arange(6).repeat(8).to(device)
    return model, images, labels


def count_casts(device, no_grad_passes, grad_passes, cache=True):
    """How often one layer's weight is cast in one region."""
    model, images, _ = make_parts(device)
    layer = model[0]
    with CountCasts(layer.weight.shape) as counter, torch.amp.autocast(device, torch.bfloat16, cache_enabled=cache):
        for _ in range(no_grad_passes):
            with torch.no_grad():
                layer(images)
        for _ in range(grad_passes):
            layer(images)
    return counter.casts


def cache_at_work(device):
    print("  passes of one layer in one region             casts of its weight")
    counts = {}
    for name, arguments in {
        "3 with gradients": (0, 3),
        "3 with gradients, cache_enabled=False": (0, 3, False),
        "2 under no_grad, then 1 with gradients": (2, 1),
    }.items():
        counts[name] = count_casts(device, *arguments)
        print(f"  {name:<48}{counts[name]:>6}")
    assert list(counts.values())[:2] == [1, 3] and list(counts.values())[2] in (1, 2), (
        "the cache did not save the casts of equal weights, or saved them with cache_enabled=False"
    )
    return counts["2 under no_grad, then 1 with gradients"]


def has_the_bug(device):
    """Whether a training pass takes the copy that a pass under no_grad left in the cache."""
    layer = nn.Linear(8, 8, device=device)
    values = torch.ones(4, 8, device=device)
    with torch.amp.autocast(device, torch.bfloat16):
        with torch.no_grad():
            layer(values)
        loss = layer(values).float().sum()
    if loss.requires_grad:
        loss.backward()
    return layer.weight.grad is None


def train(device, detached):
    """Ten updates; `detached` uses copies that were made under no_grad, as the bug does. Returns losses and model."""
    model, images, labels = make_parts(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.amp.autocast(device, torch.bfloat16):
            weights = [model[0].weight, model[2].weight]
            if detached:
                weights = [weight.detach().bfloat16() for weight in weights]
            hidden = functional.linear(images, weights[0], model[0].bias).relu()
            loss = functional.cross_entropy(functional.linear(hidden, weights[1], model[2].bias), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def main(device):
    print(f"1. How often a weight is cast ({device})")
    casts = cache_at_work(device)
    bug = has_the_bug(device)
    print(f"2. Does this version, {torch.__version__}, have the bug?")
    print("  YES: the weight got no gradient; use separate regions" if bug else "  no: the weight got its gradient")
    print("3. Broken: what the bug does, rebuilt by hand so that every version shows it")
    right, model = train(device, False)
    wrong, broken = train(device, True)
    for name, losses, some in (("right", right, model), ("broken", wrong, broken)):
        without = [key for key, parameter in some.named_parameters() if parameter.grad is None]
        print(f"  {name:<7} loss {losses[0]:.3f} -> {losses[-1]:.3f}, without gradient: {', '.join(without) or 'none'}")
    assert broken[0].weight.grad is None and broken[0].bias.grad is not None, (
        "the broken run's weight got a gradient, or its bias got none"
    )
    assert right[-1] < wrong[-1] < wrong[0], (
        "the broken run did not learn less than the right one, or did not learn at all"
    )
    print("RULE: one autocast region for each forward pass; no_grad passes get their own.")
    return f"{casts}, with torch {torch.__version__}"


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
