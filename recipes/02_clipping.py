"""Recipe 2: gradient clipping.

Rule: scaler.unscale_(optimizer) once per update, after all of its backward passes; then clip; then step.
Why: until then the gradients are `scale` times too large, so a limit of 1.0 means 1.0 / scale.
When it is broken: the norm in the log is in the thousands, training crawls with SGD (every update is cut to
almost nothing). Adam hides it, because it divides by the gradient's size: the log is then the only sign.
"""

import argparse
import sys
import textwrap

import torch
from torch import nn
from torch.nn import functional

QUESTION = """With SGD, clipping before unscale_ cuts an update to almost nothing.
With Adam, how large is the broken update, in percent of the right one?"""
MAX_NORM = 0.1
SCALE = 65536.0


def make_parts(device, optimizer_class=torch.optim.SGD):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 6)).to(device)
    images = torch.randn(48, 64).to(device)
    labels = torch.arange(6).repeat(8).to(device)
    return model, optimizer_class(model.parameters(), lr=0.1), images, labels


def one_update(device, dtype, unscale_first=True, optimizer_class=torch.optim.SGD):
    """Return the norm that clipping measured, and how far the update moved the weights."""
    model, optimizer, images, labels = make_parts(device, optimizer_class)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=dtype == torch.float16)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    with torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        loss = functional.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    scaler.step(optimizer)  # knows that the gradients are unscaled already, and does not do it again
    scaler.update()
    moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm()
    return norm.item(), moved.item()


def compare_orders(device):
    full = one_update(device, torch.float32)
    brain = one_update(device, torch.bfloat16)
    right = one_update(device, torch.float16)
    wrong = one_update(device, torch.float16, unscale_first=False)
    print("                                  norm seen   weights moved by")
    rows = {
        "float32": full,
        "bfloat16, no scaler": brain,
        "float16, unscale_ then clip": right,
        "float16, clip too early": wrong,
    }
    for name, (norm, moved) in rows.items():
        print(f"  {name:<28} {norm:12.4f}   {moved:.3e}")
    print(
        f"  clipped too early: a norm {wrong[0] / right[0]:.0f} times too large (the scale is {SCALE:.0f}),\n"
        "  and hardly any update"
    )
    assert abs(right[0] / full[0] - 1) < 0.01 and abs(brain[0] / full[0] - 1) < 0.05, (
        "in the order that should be right, clipping saw another norm than in float32: is it unscaled?"
    )
    assert abs(wrong[0] / right[0] / SCALE - 1) < 1e-3, (
        "the norm that was clipped too early is not too large by the scale"
    )
    assert wrong[1] < 1e-3 * right[1], "clipping too early did not lose the update"


def adam_hides_it(device):
    right = one_update(device, torch.float16, True, torch.optim.Adam)[1]
    wrong = one_update(device, torch.float16, False, torch.optim.Adam)[1]
    print(f"  Adam: moved {right:.3f} when right, {wrong:.3f} when broken: {wrong / right:.0%}")
    assert wrong / right > 1000 * SCALE**-1, "Adam lost as much of the update as the scale is large"
    return wrong / right


def broken_twice(device):
    model, optimizer, images, labels = make_parts(device)
    scaler = torch.amp.GradScaler(device)
    with torch.amp.autocast(device, dtype=torch.float16):
        loss = functional.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        print(textwrap.fill(f"RuntimeError: {error}", 78, initial_indent="  ", subsequent_indent="    "))
    else:
        raise AssertionError("a second unscale_ was accepted")


def main(device):
    print(f"1. Right and wrong order; limit {MAX_NORM} ({device})")
    compare_orders(device)
    print("2. Why nobody notices with Adam")
    share = adam_hides_it(device)
    print("3. Broken: unscale_ twice for one update")
    broken_twice(device)
    print("RULE: unscale_ once per update, after the last backward; then clip; then step.")
    return f"{share:.0%}, because Adam divides by the size of the gradient"


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
