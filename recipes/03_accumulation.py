"""Recipe 3: gradient accumulation.

Rule: divide each piece's loss so that the pieces add up to one batch; unscale_, clip, step and update only
after the last piece. The scale stays the same from the first piece to the last.
Why: .grad is a running sum. It is a sum of one thing only if every piece carries the same scale.
When it is broken: gradient norms grow with the number of pieces, results change with the piece size though
the batch is the same, or the gradient of an update is wrong after the scale moved (no error is raised).
"""

import argparse
import textwrap

import torch
from torch import nn
from torch.nn import functional


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


def accumulate(device, dtype, piece, divide="batch", update_between=False):
    """The gradient of one update over 28 images, cut into pieces of `piece`; the last may be short."""
    model, optimizer, scaler, images, labels = make_parts(device, dtype=dtype)
    pieces = list(zip(images.split(piece), labels.split(piece), strict=True))
    for number, (some_images, some_labels) in enumerate(pieces):
        with torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = functional.cross_entropy(model(some_images), some_labels, reduction="sum")
            loss = (
                loss
                / {"batch": len(images), "piece": len(some_images), "pieces": len(some_images) * len(pieces)}[divide]
            )
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
    assert show("float32, pieces of 8 8 8 4", accumulate(device, torch.float32, 8), whole) < 1e-5
    assert show("bfloat16, pieces of 8 8 8 4", accumulate(device, torch.bfloat16, 8), whole) < 0.05
    assert show("float16, pieces of 8 8 8 4", accumulate(device, torch.float16, 8), whole) < 0.01
    return whole


def broken_sums(device, whole):
    error = show("no division by the number of pieces", accumulate(device, torch.float16, 8, "piece"), whole)
    assert error > 2, "four pieces: about four times the gradient"
    error = show("mean of means: the short piece counts double", accumulate(device, torch.float16, 8, "pieces"), whole)
    assert error > 0.05
    error = show("the scale changed after the first piece", accumulate(device, torch.float16, 8, "batch", True), whole)
    assert error > 0.05, "the first piece entered at half its weight"


def broken_step_per_piece(device):
    """unscale_ for each piece: the second call raises, as a sum of scaled and unscaled would be nonsense."""
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
    print(f"1. The pieces add up to the batch ({device})")
    whole = compare(device)
    print("2. Broken: the pieces do not add up, and nothing is raised")
    broken_sums(device, whole)
    print("3. Broken: unscale_ after each piece")
    broken_step_per_piece(device)
    print("RULE: divide by the whole batch; unscale_, step, update after the last piece.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; leave --device out to run on the CPU")
    main(args.device)
