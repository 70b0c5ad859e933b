"""Recipe 10: what breaks without a scaler.

Rule: float16 needs a GradScaler; bfloat16 and float32 do not.
Why: the smallest number above zero is 6e-8 in float16 and 9e-41 in bfloat16. A loss that is a mean over many
pixels has gradients below that at every pixel, and they become exactly zero on the way back.
When it is broken: nothing fails. The loss falls more slowly or not at all, most of all in the early layers;
the share of gradients that are exactly zero, counted as here, tells.
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional

QUESTION = """A float16 network without a scaler; its loss is a mean over 16384 pixels, with a small weight.
What share of the gradients at the first layer is exactly zero?"""
SIDE = 32
UPDATES = 16
LOSS_WEIGHT = 0.002


def make_parts(device):
    """Build a small segmentation network: a label for each pixel, the loss a mean over 16 x 32 x 32 of them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2, 1)
    ).to(device)
    images = torch.randn(16, 3, SIDE, SIDE)
    labels = (functional.avg_pool2d(images.sum(1, keepdim=True), 3, 1, 1)[:, 0] > 0).long()
    return model, images.to(device), labels.to(device)


def backward(device, dtype, scaler, model, images, labels, watch=None):
    """One forward and backward; `watch` takes the gradient of the first layer's output, the end of the way."""
    with torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        first = model[0](images)
        logits = model[1:](first)
        # A small weight, as auxiliary losses have; it stands here for an image of a usual size.
        loss = LOSS_WEIGHT * functional.cross_entropy(logits, labels)
    if watch is not None:
        first.register_hook(watch)
    scaler.scale(loss).backward()
    return loss.item()


def first_gradient(device, dtype, scaled):
    """Return the share of zeros at the first layer's output, and the unscaled gradient of the first layer."""
    model, images, labels = make_parts(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device, enabled=scaled)
    seen = []
    backward(device, dtype, scaler, model, images, labels, seen.append)
    scaler.unscale_(optimizer)
    return (seen[0] == 0).float().mean().item(), model[0].weight.grad


def train(device, dtype, scaled):
    model, images, labels = make_parts(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler(device, enabled=scaled)
    losses = []
    for _ in range(UPDATES):
        optimizer.zero_grad()
        losses.append(backward(device, dtype, scaler, model, images, labels) / LOSS_WEIGHT)
        scaler.step(optimizer)
        scaler.update()
    return losses


def sweep(device):
    """Show the same gradient under scales from 1 to 2**16."""
    print("  scale           " + "".join(f"{2**power:>8}" for power in range(0, 17, 4)))
    shares = []
    for power in range(0, 17, 4):
        model, images, labels = make_parts(device)
        seen = []
        scaler = torch.amp.GradScaler(device, init_scale=2.0**power)
        backward(device, torch.float16, scaler, model, images, labels, seen.append)
        shares.append((seen[0] == 0).float().mean().item())
    print("  exactly zero    " + "".join(f"{share:>8.1%}" for share in shares))
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.001, (
        "a larger scale left more zeros, or the largest did not remove them"
    )


def main(device):
    cases = {
        "float32": (torch.float32, False),
        "bfloat16": (torch.bfloat16, False),
        "float16 + scaler": (torch.float16, True),
        "float16, no scaler": (torch.float16, False),
    }
    print(f"1. Gradients at the first layer's output, and of its weights ({device})")
    print("                        exactly zero        weights: norm    error")
    reference = first_gradient(device, torch.float32, False)[1]
    zeros = {}
    errors = {}
    for name, (dtype, scaled) in cases.items():
        zeros[name], gradient = first_gradient(device, dtype, scaled)
        errors[name] = ((gradient - reference).norm() / reference.norm()).item()
        print(f"  {name:<20} {zeros[name]:12.1%} {gradient.norm().item():20.3e} {errors[name]:8.2%}")
    assert zeros["float16, no scaler"] > 0.5 and max(zeros[name] for name in list(cases)[:3]) < 0.01, (
        "without a scaler fewer than half of the float16 gradients are zero, or more than 1 % are in another case"
    )
    assert errors["float16, no scaler"] > 0.3 and errors["float16 + scaler"] < 0.02, (
        "without a scaler the float16 gradient is nearly right, or with one it is wrong"
    )

    print("2. float16: how much scale is enough")
    sweep(device)

    print(f"3. {UPDATES} updates; loss per pixel")
    last = {}
    for name, case in cases.items():
        losses = train(device, *case)
        last[name] = losses[-1]
        print(f"  {name:<20}" + "".join(f"{loss:9.4f}" for loss in losses[::5]))
    assert abs(last["float16 + scaler"] - last["float32"]) < 0.02 < last["float16, no scaler"] - last["float32"], (
        "without a scaler float16 reached float32's loss, or with one it did not"
    )
    print("RULE: float16 needs a GradScaler; without one, gradients become zero unnoticed.")
    return f"{zeros['float16, no scaler']:.1%}, and training goes on"


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
