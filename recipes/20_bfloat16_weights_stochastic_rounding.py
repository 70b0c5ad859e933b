"""Recipe 20: weights kept in bfloat16, by stochastic rounding.

Rule: keep weights and moments in float32. If memory forbids it, round a bfloat16 weight up or down by chance, with
the probability that its distance gives, so that its mean is right.
Why: a bfloat16 has 8 bits of precision. A step below 1/512 of the weight is rounded away, each time, for ever;
by chance, one in so many steps goes through, and the sum comes out right.
When it is broken: training with bfloat16 weights stands still as soon as the rate is low. Adam's second moment
stands still as well: 0.1 % decay is less than half a step.
Source: Gupta et al., Deep Learning with Limited Numerical Precision, 2015, https://arxiv.org/abs/1502.02551
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional

QUESTION = """A weight of 1 gets + 0.0003, a thousand times. Where does it end in bfloat16
(1) rounded to the nearest, (2) rounded by chance?"""
UPDATES = 150


def nearest(values):
    return values.bfloat16()


def truncated(values):
    """Towards zero: the last 16 bits are cut off."""
    return (values.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


def by_chance(values):
    """float32 to bfloat16, up with the probability that the cut bits stand for: their mean is the value itself."""
    noise = torch.randint_like(values, 1 << 16, dtype=torch.int32)
    return ((values.view(torch.int32) + noise) & -0x10000).view(torch.float32).bfloat16()


ROUNDINGS = {"float32": None, "nearest": nearest, "truncated": truncated, "by chance": by_chance}


def add(weight, change, rounding):
    """weight + change, computed in float32 and kept as `rounding` says."""
    total = weight.float() + change
    return total if rounding is None else rounding(total)


def one_number(device):
    values = torch.full((100_000,), 1.001, device=device)
    means = {name: rounding(values).float().mean().item() for name, rounding in list(ROUNDINGS.items())[1:]}
    print("  mean of 100,000 roundings of 1.001:")
    print("  " + ", ".join(f"{name} {mean:.5f}" for name, mean in means.items()))
    assert means["nearest"] == means["truncated"] == 1 and abs(means["by chance"] - 1.001) < 1e-4, (
        "rounding to nearest or by truncation moved 1.001, or rounding by chance missed its mean"
    )


def small_steps(device):
    ends = {}
    for name, rounding in ROUNDINGS.items():
        weight = add(torch.ones(1000, device=device), 0.0, rounding)
        for _ in range(1000):
            weight = add(weight, 0.0003, rounding)
        ends[name] = weight.float()
        print(f"  {name:<10} mean {ends[name].mean().item():.4f}, spread of 1000 weights {ends[name].std().item():.4f}")
    assert abs(ends["float32"].mean() - 1.3) < 1e-3 > abs(ends["nearest"].mean() - 1), (
        "float32 did not reach 1.3, or rounding to nearest left 1"
    )
    assert abs(ends["by chance"].mean() - 1.3) < 0.01, "rounding by chance did not reach 1.3"
    return ends["nearest"].mean().item(), ends["by chance"].mean().item()


def second_moment(device):
    """Adam's running mean of squared gradients, beginning at 1, when gradients have become zero."""
    ends = {}
    for name, rounding in ROUNDINGS.items():
        moment = add(torch.ones(1000, device=device), 0.0, rounding)
        for _ in range(500):
            moment = add(moment, -0.001 * moment.float(), rounding)
        ends[name] = moment.float().mean().item()
    print("  " + ", ".join(f"{name} {end:.3f}" for name, end in ends.items()))
    assert ends["nearest"] == 1 and abs(ends["by chance"] - ends["float32"]) < 0.02, (
        "rounding to nearest moved the moment, or rounding by chance missed float32's"
    )


def train(device, rounding):
    """Plain SGD at a low rate; the last loss, and the share of weights that differ from what they began as."""
    torch.manual_seed(0)
    images = torch.randn(480, 64)
    labels = (images @ torch.randn(64, 6)).argmax(1).to(device)
    images = images.to(device)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 6)).to(device)
    weights = [add(parameter.detach(), 0.0, rounding) for parameter in model.parameters()]
    before = [weight.clone() for weight in weights]
    for _ in range(UPDATES):
        leaves = [weight.float().requires_grad_() for weight in weights]
        hidden = functional.linear(images, leaves[0], leaves[1]).tanh()
        loss = functional.cross_entropy(functional.linear(hidden, leaves[2], leaves[3]), labels)
        gradients = torch.autograd.grad(loss, leaves)
        weights = [add(weight, -0.02 * gradient, rounding) for weight, gradient in zip(weights, gradients, strict=True)]
    moved = sum((new != old).sum().item() for new, old in zip(weights, before, strict=True))
    return loss.item(), moved / sum(weight.numel() for weight in weights)


def main(device):
    print(f"1. One number ({device})")
    one_number(device)
    print("2. A weight of 1, + 0.0003, a thousand times")
    plain, chance = small_steps(device)
    print("3. Adam's second moment, begun at 1, after 500 updates of - 0.1 %")
    second_moment(device)
    print(f"4. A network, SGD at rate 0.02, {UPDATES} updates")
    losses = {}
    for name, rounding in ROUNDINGS.items():
        losses[name], moved = train(device, rounding)
        print(f"  {name:<10} loss {losses[name]:.4f}, weights that moved {moved:.1%}")
    gap = losses["nearest"] - losses["float32"]
    assert gap > 0.05 and abs(losses["by chance"] - losses["float32"]) < 0.2 * gap, (
        "rounding to nearest lost nothing, or rounding by chance lost as much"
    )
    print("RULE: float32 weights; if they must be bfloat16, round them by chance.")
    return f"(1) {plain:.4f}, (2) {chance:.4f} on average (float32: 1.3)"


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
