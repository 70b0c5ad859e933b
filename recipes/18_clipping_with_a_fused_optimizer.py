"""Recipe 18: clipping, and everything else that reads .grad, with a fused optimizer.

Rule: call scaler.unscale_(optimizer) yourself before anything reads or changes .grad, even if the code worked
without it.
Why: scaler.step() unscales the gradients first and then calls the optimizer, unless the optimizer is fused: then
the kernel itself divides by the scale. A hook on the optimizer's step sees true gradients in the first case and
scaled ones in the second.
When it is broken: `fused=True`, which only makes things faster, turns a working clip into one at limit / scale.
A fused optimizer's step is also called when the update is skipped, so that hooks count updates that never happened.
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional

MAX_NORM = 0.1
SCALE = 65536.0
QUESTION = """A hook clips the gradients just before the optimizer's step, and it works.
Somebody adds fused=True. How many times too large is the norm that the hook sees?"""


def one_update(device, unscale_first=False, **options):
    """Run an update with a hook that clips. Return the norm in the hook and how far the weights moved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 6)).to(device)
    images = torch.randn(48, 64).to(device)
    labels = torch.arange(6).repeat(8).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)
    norms = []
    optimizer.register_step_pre_hook(
        lambda *_: norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
    )
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    with torch.amp.autocast(device, dtype=torch.float16):
        loss = functional.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm()
    return norms[0], moved.item()


def compare_optimizers(device):
    print("                                    norm seen   weights moved by")
    results = {}
    for name, unscale_first, options in (
        ("foreach, hook clips", False, {"foreach": True}),
        ("fused, hook clips", False, {"fused": True}),
        ("fused, unscale_ first", True, {"fused": True}),
    ):
        results[name] = one_update(device, unscale_first, **options)
        print(f"  {name:<28} {results[name][0]:14.4f}   {results[name][1]:.3e}")
    plain, broken, mended = results.values()
    print(f"  fused without unscale_: a norm {broken[0] / plain[0]:.0f} times too large, and hardly an update")
    assert abs(broken[0] / plain[0] / SCALE - 1) < 0.01 and broken[1] < 1e-3 * plain[1], (
        "the fused optimizer's hook did not see a norm too large by the scale, or its update was not lost"
    )
    assert abs(mended[0] / plain[0] - 1) < 0.01 and abs(mended[1] / plain[1] - 1) < 0.01, (
        "unscale_ before the hook did not mend the norm or the update"
    )
    return broken[0] / plain[0]


def skipped_update(device, **options):
    """Run an update with an infinite gradient. Return calls of the optimizer's step, and Adam's own count of steps."""
    weight = torch.ones(4, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1, **options)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(before, weight) and scaler.get_scale() == SCALE / 2, (
        "the second update was not skipped, or did not halve the scale"
    )
    return len(calls), int(optimizer.state[weight]["step"])


def error_if_nonfinite(device):
    """clip_grad_norm_ can raise at a norm that is not finite; a scaler needs such updates to find its scale."""
    weight = torch.ones(4, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)
    scaler.scale((weight * float("inf")).sum()).backward()
    scaler.unscale_(optimizer)
    try:
        nn.utils.clip_grad_norm_([weight], MAX_NORM, error_if_nonfinite=True)
    except RuntimeError as error:
        return str(error).partition(" for ")[0] + " is non-finite ..."
    raise AssertionError("clip_grad_norm_ took an infinite norm")


def main(device):
    print(f"1. One hook, three ways; limit {MAX_NORM}, scale {SCALE:.0f} ({device})")
    ratio = compare_optimizers(device)
    print("2. Two updates, the second skipped")
    for name, options in (("foreach", {"foreach": True}), ("fused", {"fused": True})):
        calls, steps = skipped_update(device, **options)
        print(f"  {name:<9} step() called {calls} times, Adam counts {steps}: {calls - steps} too many for a hook")
        assert (calls, steps) == ((2, 1) if name == "fused" else (1, 1)), (
            "the hook was not called twice for the fused optimizer's one step"
        )
    print("3. Broken: error_if_nonfinite=True together with a scaler")
    print(f"  RuntimeError: {error_if_nonfinite(device)}")
    print("  Without that option the scaler skips this update and halves its scale.")
    print("RULE: unscale_ before anything reads .grad; fused=True takes away what hid it.")
    return f"{ratio:.0f} times, which is the scale"


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
