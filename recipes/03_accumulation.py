"""Recipe 3: gradient accumulation.

Rule: divide each micro-batch's loss so that the micro-batches add up to one batch; unscale_, clip, step and update only
after the last one. The scale stays the same from the first micro-batch to the last.
Why: .grad is a running sum. It is a sum of one thing only if every micro-batch carries the same scale.
When it is broken: gradient norms grow with the number of micro-batches, results change with their size
though the batch is the same, or the gradient of an update is wrong after the scale moved (no error is raised).
"""

import argparse
import sys
import textwrap

import torch
from torch import nn
from torch.nn import functional

QUESTION = """28 images run in micro-batches of 8, 8, 8 and 4. The loss of each is the mean of its own
images, divided by 4. By how many percent is the gradient wrong?"""


def make_parts(device, dtype=torch.float16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 6)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the weights stay, so that gradients compare
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=dtype == torch.float16)
    images = torch.randn(28, 64).to(device)
    labels = (torch.arange(28) % 6).to(device)
    return model, optimizer, scaler, images, labels


def flat_gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def divisors(batch, micro_batch, count):
    """Return three divisors for a micro-batch's summed loss: only the first is right."""
    return {"batch": batch, "micro-batch": micro_batch, "mean of means": micro_batch * count}


def accumulate(device, dtype, size, divide="batch", update_between=False):
    """Return the gradient of one update over 28 images, in micro-batches of `size`; the last may be smaller."""
    model, optimizer, scaler, images, labels = make_parts(device, dtype=dtype)
    parts = list(zip(images.split(size), labels.split(size), strict=True))
    for number, (some_images, some_labels) in enumerate(parts):
        with torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = functional.cross_entropy(model(some_images), some_labels, reduction="sum")
            loss = loss / divisors(len(images), len(some_images), len(parts))[divide]
        scaler.scale(loss).backward()
        if update_between and number == 0:
            scaler.update(scaler.get_scale() * 2)  # the scale grows in the middle of the update
    scaler.unscale_(optimizer)
    return flat_gradient(model)


def show(name, gradient, reference):
    error = ((gradient - reference).norm() / reference.norm()).item()
    print(f"  {name:<46} norm {gradient.norm().item():.4f}  error {error:7.2%}")
    return error


def compare(device):
    whole = accumulate(device, torch.float32, 28)
    show("float32, one batch of 28", whole, whole)
    assert show("float32, parts of 8 8 8 4", accumulate(device, torch.float32, 8), whole) < 1e-5, (
        "micro-batches in float32 do not give the gradient of the whole batch"
    )
    assert show("bfloat16, parts of 8 8 8 4", accumulate(device, torch.bfloat16, 8), whole) < 0.05, (
        "micro-batches in bfloat16 do not give the gradient of the whole batch"
    )
    assert show("float16, parts of 8 8 8 4", accumulate(device, torch.float16, 8), whole) < 0.01, (
        "micro-batches in float16 do not give the gradient of the whole batch"
    )
    return whole


def broken_sums(device, whole):
    error = show(
        "no division by the number of micro-batches", accumulate(device, torch.float16, 8, "micro-batch"), whole
    )
    assert error > 2, "without the division the gradient of four micro-batches is not about four times as large"
    means = show(
        "mean of means: the short one counts double", accumulate(device, torch.float16, 8, "mean of means"), whole
    )
    assert means > 0.05, "a mean of means gave the gradient of the whole batch"
    error = show("the scale changed after the first one", accumulate(device, torch.float16, 8, "batch", True), whole)
    assert error > 0.05, "a scale that changed between micro-batches changed nothing"
    return means


def broken_step_per_piece(device):
    """unscale_ for each micro-batch: the second call raises, as a sum of scaled and unscaled would be nonsense."""
    model, optimizer, scaler, images, labels = make_parts(device)
    try:
        for some_images, some_labels in zip(images.split(14), labels.split(14), strict=True):
            with torch.amp.autocast(device, dtype=torch.float16):
                loss = functional.cross_entropy(model(some_images), some_labels)
            scaler.scale(loss / 2).backward()
            scaler.unscale_(optimizer)
    except RuntimeError as error:
        print(textwrap.fill(f"RuntimeError: {error}", 78, initial_indent="  ", subsequent_indent="    "))
    else:
        raise AssertionError("unscale_ was accepted in the middle of an update")


def main(device):
    print(f"1. Micro-batches add up to the batch ({device})")
    whole = compare(device)
    print("2. Broken: they do not add up, and nothing is raised")
    error = broken_sums(device, whole)
    print("3. Broken: unscale_ after each micro-batch")
    broken_step_per_piece(device)
    print("RULE: divide by the whole batch; unscale_, step, update after the last part.")
    return f"{error:.0%}: the images of the short micro-batch count double"


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
