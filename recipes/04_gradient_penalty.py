"""Recipe 4: a gradient penalty.

Rule: take the penalty's gradients from the scaled loss, autograd.grad(scaler.scale(loss), create_graph=True);
multiply them by 1 / scale yourself; compute the penalty from these, inside autocast; then scale the sum.
Why: autograd.grad writes no .grad, so the scaler never sees these gradients and cannot unscale them.
When it is broken: the penalty is `scale` times too large. The total overflows, the scaler backs off again and
again, and once it finds a scale it can live with, the penalty's weight depends on that scale.
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional

QUESTION = """A gradient penalty is computed from gradients that still carry the scale of 65536.
How many of 16 updates are skipped, and how far does the loss get (right: from 1.83 to 1.32)?"""


def make_parts(device, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 6)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    images = torch.randn(48, 64).to(device)
    labels = torch.arange(6).repeat(8).to(device)
    return model, optimizer, scaler, images, labels


def penalty_of(gradients):
    return sum(gradient.pow(2).sum() for gradient in gradients).sqrt()


def one_update(device, dtype, model, optimizer, scaler, images, labels, unscale):
    optimizer.zero_grad()
    amp = {"device_type": device, "dtype": dtype, "enabled": dtype != torch.float32}
    with torch.amp.autocast(**amp):
        loss = functional.cross_entropy(model(images), labels)
    # Outside autocast, as any backward pass; create_graph because the penalty is differentiated in turn.
    gradients = torch.autograd.grad(scaler.scale(loss), list(model.parameters()), create_graph=True)
    if unscale:
        gradients = [gradient * (1.0 / scaler.get_scale()) for gradient in gradients]
    with torch.amp.autocast(**amp):
        penalty = penalty_of(gradients)
        total = loss + penalty
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item(), penalty.item()


def diary(device, dtype, unscale=True, updates=16):
    parts = make_parts(device, dtype)
    scaler = parts[2]
    rows = []
    for _ in range(updates):
        scale = scaler.get_scale()
        loss, penalty = one_update(device, dtype, *parts, unscale=unscale)
        rows.append((loss, penalty, scale, scaler.get_scale() < scale))
    return rows


def main(device):
    print(f"1. The penalty of the same model, first update ({device})")
    full = diary(device, torch.float32)
    brain = diary(device, torch.bfloat16)
    right = diary(device, torch.float16)
    wrong = diary(device, torch.float16, unscale=False)
    rows = {
        "float32": full,
        "bfloat16, no scaler": brain,
        "float16, unscaled by hand": right,
        "float16, left scaled (broken)": wrong,
    }
    for name, run in rows.items():
        print(f"  {name:<30} penalty {run[0][1]:12.4f}")
    print(f"  left scaled: {wrong[0][1] / right[0][1]:.0f} times the penalty; the scale is {wrong[0][2]:.0f}")
    assert abs(right[0][1] / full[0][1] - 1) < 0.01 and abs(brain[0][1] / full[0][1] - 1) < 0.05, (
        "the penalty of unscaled gradients is not float32's"
    )
    assert abs(wrong[0][1] / right[0][1] / wrong[0][2] - 1) < 0.01, (
        "the penalty of scaled gradients is not too large by the scale"
    )

    print("2. Sixteen updates with it, and the loss without the penalty")
    print("          unscaled by hand             left scaled (broken)")
    print("  update    loss     scale               loss     scale")
    for update in range(0, 16, 3):
        cells = [
            f"{loss:8.4f}  {scale:8.0f} {'skipped' if skipped else '':7}"
            for loss, _, scale, skipped in (right[update], wrong[update])
        ]
        print(f"  {update:6}{cells[0]}   {cells[1]}")
    skips = [sum(row[3] for row in run) for run in (right, wrong)]
    print(
        f"  skipped updates: {skips[0]} and {skips[1]}; last loss: {right[-1][0]:.4f} and {wrong[-1][0]:.4f}, "
        f"float32 {full[-1][0]:.4f}"
    )
    assert skips[0] == 0 < skips[1] and wrong[-1][2] < right[-1][2], (
        "the right run skipped updates, or the broken one skipped none and kept its scale"
    )
    assert abs(right[-1][0] - full[-1][0]) < 0.01 < abs(wrong[-1][0] - full[-1][0]), (
        "the right run did not end at float32's loss, or the broken one did"
    )
    print("RULE: multiply a penalty's gradients by 1 / scale by hand, then scale the sum.")
    return f"{skips[1]} skipped, and the loss ends at {wrong[-1][0]:.1f}"


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
