"""Recipe 17: gradients that are NaN while the loss is finite.

Rule: an eps inside a float16 expression must be one that float16 has (1e-6, better 1e-4), or the expression
runs in float32.
Why: float16 turns everything up to 2**-25 = 3e-8 into zero. An eps of 1e-8 is then no eps: the root of zero is
zero, which is finite, but its slope is infinite, and infinity times zero is NaN.
When it is broken: the loss in the log looks healthy and does not move. Every update is skipped, the scale falls
through 1, and no scale helps, because NaN is not too large: it is NaN at every scale.
"""

import argparse
import sys
import warnings

import torch
from torch import nn

QUESTION = """A float16 network has a finite loss of about 0.2, and one of its 32 pairs has distance 0.
Its square root has eps = 1e-8. How many of its 4 weight gradients are finite?"""


class Distance(nn.Module):
    """Root mean square distance of two batches of embeddings (N, C), a number for each pair."""

    def __init__(self, eps=1e-8, in_float32=False):
        super().__init__()
        self.eps = eps
        self.in_float32 = in_float32

    def distance(self, left, right):
        difference = left - right
        return ((difference * difference).mean(1) + self.eps).sqrt()

    def forward(self, left, right):
        if not self.in_float32:
            return self.distance(left, right)
        with torch.amp.autocast(left.device.type, enabled=False):
            return self.distance(left.float(), right.float())


def make_parts(device):
    """Build a network of embeddings, and pairs; the first pair has two equal images, as duplicates are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).to(device)
    left = torch.randn(32, 64)
    right = left + torch.randn(32, 64)
    right[0] = left[0]
    return model, left.to(device), right.to(device)


def forward(model, distance, left, right):
    """Similar pairs should end near one another: the mean distance is the loss."""
    return distance(model(left), model(right)).float().mean()


def one_backward(device, dtype, scale=1.0, **options):
    """Return the loss and how many gradients of the four weights and biases are finite."""
    model, left, right = make_parts(device)
    with torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        loss = forward(model, Distance(**options), left, right)
    (loss * scale).backward()
    return loss.item(), sum(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def train(device, **options):
    """Twelve float16 updates with a scaler; returns the losses and the scale at the end."""
    model, left, right = make_parts(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.amp.autocast(device, dtype=torch.float16):
            loss = forward(model, Distance(**options), left, right)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, scaler.get_scale()


def sweep(device):
    """Which eps survives in which type."""
    powers = range(-4, -10, -1)
    print("  eps        " + "".join(f"{10.0**power:>9.0e}" for power in powers))
    for dtype in (torch.float16, torch.bfloat16):
        finite = [one_backward(device, dtype, eps=10.0**power)[1] == 4 for power in powers]
        print(f"  {str(dtype)[6:]:<11}" + "".join(f"{'finite' if good else 'NaN':>9}" for good in finite))
        assert finite == [dtype == torch.bfloat16 or power > -8 for power in powers], (
            "the wrong eps survive: in float16 from 1e-8 on they should be zero"
        )


def name_the_operator(device):
    """Anomaly detection stops at the first NaN of the backward pass. It is slow: use it on one bad batch only."""
    model, left, right = make_parts(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it also warns, with the traceback of the forward call, which is long
        with torch.autograd.detect_anomaly():
            with torch.amp.autocast(device, dtype=torch.float16):
                loss = forward(model, Distance(), left, right)
            try:
                loss.backward()
            except RuntimeError as error:
                return str(error)
    raise AssertionError("the NaN was not found")


def main(device):
    print(f"1. One backward pass, eps = 1e-8 ({device})")
    finite = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loss, finite[dtype] = one_backward(device, dtype)
        print(f"  {str(dtype)[6:]:<9} loss {loss:.4f}, {finite[dtype]} of 4 gradients finite")
        assert 0.1 < loss < 0.4, "the loss is not finite, or not where it should begin"
    assert finite[torch.float32] == finite[torch.bfloat16] == 4 > finite[torch.float16], (
        "float16's gradients are as finite as the others, or the others' are not"
    )
    print("2. Which eps is one")
    sweep(device)
    print("3. Broken: twelve updates with a scaler; no scale helps")
    losses, scale = train(device)
    print(f"  loss {losses[0]:.4f} -> {losses[-1]:.4f}, scale 1024 -> {scale:g}: all 12 skipped")
    assert losses[0] == losses[-1] and scale == 1024 / 2**12, (
        "an update was not skipped, or a skipped one changed the loss"
    )
    assert all(one_backward(device, torch.float16, 2.0**power)[1] < 4 for power in range(-8, 9, 4)), (
        "some scale made all gradients finite"
    )
    print("4. Who did it")
    message = name_the_operator(device)
    print(f"  {message}")
    print("  There an infinity, the slope of sqrt one step earlier, met the difference 0.")
    assert "MulBackward0" in message and "nan" in message, "anomaly detection does not name the operator"
    print("5. Two cures")
    for name, options in (("eps = 1e-4", {"eps": 1e-4}), ("distance in float32", {"in_float32": True})):
        losses, scale = train(device, **options)
        print(f"  {name:<20} loss {losses[0]:.4f} -> {losses[-1]:.4f}, scale {scale:g}")
        assert losses[-1] < losses[0] and scale == 1024, "a cure did not make the loss fall, or skipped updates"
    print("RULE: an eps of 3e-8 or less is zero in float16: raise it, or use float32 there.")
    return f"{finite[torch.float16]} of 4 (all 4 in float32 and in bfloat16)"


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
