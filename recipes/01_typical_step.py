"""Recipe 1: the typical step.

Rule: weights stay float32. Autocast wraps the forward pass and the loss, and nothing else. One scaler
serves the whole run: scale(loss).backward(), step(optimizer), update().
Why: the matrix products run in 16 bits, yet a small update still changes a 32-bit weight; the scaler lifts
small gradients over the lower end of float16 and throws away an update whose gradients overflowed.
When it is broken: the loss stops falling although nothing is NaN (weights in float16), the scaler refuses
with "Attempting to unscale FP16 gradients", or a step inside autocast seems to change nothing.
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional

QUESTION = """A GradScaler begins at a scale of 4194304, which is too high for this network.
How many of ten float16 updates does it skip?"""


def make_model(device):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 6)]
    return nn.Sequential(*layers).to(device)


def make_batch(device):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(6).repeat(6)
    patterns = torch.randn(6, 3, 16, 16, generator=generator)
    images = patterns[labels] + torch.randn(36, 3, 16, 16, generator=generator)
    return images.to(device), labels.to(device)


def train(device, dtype, updates=10):
    """Run the typical step; float32 is the same code with autocast and scaler disabled."""
    model = make_model(device)
    (images, labels) = make_batch(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**22, enabled=dtype == torch.float16)
    diary = []
    for _ in range(updates):
        optimizer.zero_grad()
        with torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(images)
            loss = functional.cross_entropy(logits, labels)
        weight_before = model[0].weight.detach().clone()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale  # step() reports nothing: a fallen scale is the sign
        assert skipped == torch.equal(weight_before, model[0].weight), (
            "a skipped update moved the weights, or one that was not skipped left them alone"
        )
        diary.append((loss.item(), scale, skipped))
    dtypes = [str(tensor.dtype)[6:] for tensor in (model[0].weight, logits, loss, model[0].weight.grad)]
    print(f"  {str(dtype)[6:]:<9} weight {dtypes[0]}, logits {dtypes[1]}, loss {dtypes[2]}, gradient {dtypes[3]}")
    assert dtypes == ["float32", str(dtype)[6:], "float32", "float32"], (
        "a weight, loss or gradient is not float32, or the logits are not in the type that was asked for"
    )
    return diary


def broken_half_weights(device):
    """Show that a float16 weight w cannot move by less than about w / 2048."""
    still = {}
    for dtype in (torch.float32, torch.float16):
        model = make_model(device).to(dtype)
        (images, labels) = make_batch(device)
        before = model[4].weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        functional.cross_entropy(model(images.to(dtype)).float(), labels).backward()
        optimizer.step()
        still[dtype] = (before == model[4].weight).float().mean().item()
    print(
        f"  weights unmoved by a step at rate 1e-4: float32 {still[torch.float32]:.0%}, "
        f"float16 {still[torch.float16]:.0%}"
    )
    assert still[torch.float16] > still[torch.float32] + 0.3, "float16 weights moved nearly as well as float32 ones"
    scaler = torch.amp.GradScaler(device)
    scaler.scale(model(images.half()).float().sum()).backward()
    try:
        scaler.step(optimizer)
    except ValueError as error:
        print(f"  the scaler's answer to model.half(): {error}")
    else:
        raise AssertionError("the scaler took float16 gradients")


def broken_step_inside_autocast(device):
    """Autocast keeps the 16-bit copy of each weight until the region ends, so a step within goes unseen."""
    model = make_model(device).eval()
    (images, _) = make_batch(device)
    with torch.amp.autocast(device, dtype=torch.bfloat16):
        before = model(images)
        with torch.no_grad():
            model[4].weight.mul_(2)  # what an optimizer step does: change the weight in place
        inside = model(images)
    with torch.amp.autocast(device, dtype=torch.bfloat16):
        after = model(images)
    change = [(logits - before).abs().max().item() for logits in (inside, after)]
    print(f"  weight doubled inside: logits moved by {change[0]:.3f}; in the next region: {change[1]:.3f}")
    assert change[0] == 0 < change[1], "logits changed within the region, or did not change in the next one"


def main(device):
    print(f"1. Three precisions, one piece of code ({device})")
    runs = [train(device, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    print("  update   float32  bfloat16   float16       scale")
    for update, (full, brain, half) in enumerate(zip(*runs, strict=True)):
        note = "  skipped" if half[2] else ""
        print(f"  {update:6}  {full[0]:8.4f}  {brain[0]:8.4f}  {half[0]:8.4f}  {half[1]:10.0f}{note}")
    skips = sum(skipped for _, _, skipped in runs[2])
    print(f"  the scale began too high on purpose: {skips} updates skipped, then training went on")
    assert 0 < skips < 10 and runs[2][-1][0] < runs[2][0][0] and abs(runs[0][-1][0] - runs[1][-1][0]) < 0.05, (
        "no update was skipped, or all were, or the loss did not fall as in float32"
    )
    print("2. Broken: the model in float16")
    broken_half_weights(device)
    print("3. Broken: the optimizer's step inside autocast")
    broken_step_inside_autocast(device)
    print("RULE: float32 weights; autocast around forward and loss only; one scaler.")
    return f"{skips}"


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
