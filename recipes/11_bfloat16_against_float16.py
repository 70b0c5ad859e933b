"""Recipe 11: bfloat16 against float16.

Rule: bfloat16 has float32's range and needs no scaler; float16 has eight times its precision and needs one.
Take bfloat16 where the hardware has it; keep weights, sums and losses in float32 with either.
Why: both have 16 bits. bfloat16 spends 8 on the exponent and 7 on digits, float16 spends 5 and 10.
When it is broken: inf or NaN from float16 (range), or a running sum that stops growing from bfloat16 (digits).
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional

QUESTION = """1 + 1 + 1 and so on, 3000 times. Where does the sum stop in bfloat16, and where in float16?"""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row(name, cells):
    print(f"{name:<36}" + "".join(f"{cell:>13}" for cell in cells))


def formats():
    limits = [torch.finfo(dtype) for dtype in DTYPES]
    row("  largest", [f"{limit.max:.4g}" for limit in limits])
    row("  smallest at full precision", [f"{limit.tiny:.4g}" for limit in limits])
    row("  smallest above zero", [f"{limit.smallest_normal * limit.eps:.4g}" for limit in limits])
    row("  next number after 1: 1 +", [f"{limit.eps:.4g}" for limit in limits])
    assert limits[1].max > 1e38 and limits[2].max == 65504, (
        "bfloat16 has not the range of float32, or float16 has not 65504 as its largest number"
    )
    assert limits[1].eps == 8 * limits[2].eps, "bfloat16's step is not 8 times float16's"


def range_and_digits(device):
    """Three plain numbers: one too large, one too small, one that needs digits."""
    values = {"70000": 70000.0, "0.00000001": 1e-8, "1.001": 1.001}
    results = {}
    for name, value in values.items():
        results[name] = [torch.tensor(value, dtype=dtype, device=device).item() for dtype in DTYPES]
        row(f"  {name} becomes", [f"{result:.6g}" for result in results[name]])
    assert results["70000"][2] == float("inf") and results["70000"][1] == 70144, (
        "70000 did not overflow in float16 alone"
    )
    assert results["0.00000001"][2] == 0 < results["0.00000001"][1], "1e-8 did not become zero in float16 alone"
    assert results["1.001"][1] == 1.0 < results["1.001"][2], "1.001 did not become 1 in bfloat16 alone"


def running_sum(device):
    """Show that a sum in 16 bits stops growing when one more is at most half a step: never keep one."""
    sums = []
    safe = []
    for dtype in DTYPES:
        total = torch.zeros((), dtype=dtype, device=device)
        for _ in range(3000):
            total += 1
        sums.append(total.item())
        safe.append(torch.ones(3000, dtype=dtype, device=device).sum(dtype=torch.float32).item())
    row("  1 + 1 + ... 3000 times, one by one", [f"{total:.0f}" for total in sums])
    row("  ones(3000).sum(dtype=float32)", [f"{total:.0f}" for total in safe])
    assert sums == [3000, 256, 2048] and safe == [3000] * 3, (
        "sums one by one do not stop at 256 and 2048, or those in float32 are wrong"
    )
    return sums


def small_update(device):
    """Add 0.0003 to a weight of 1, a hundred times."""
    ends = []
    for dtype in DTYPES:
        weight = torch.ones((), dtype=dtype, device=device)
        for _ in range(100):
            weight += 0.0003
        ends.append(weight.item())
    row("  weight 1, + 0.0003, 100 times", [f"{end:.5f}" for end in ends])
    assert abs(ends[0] - 1.03) < 1e-5 and ends[1:] == [1.0, 1.0], (
        "a 16-bit weight of 1 moved: its step was not too small"
    )


def network_error(device):
    """Compare the rounding of a real network's logits and gradients under autocast with float32."""
    results = []
    for dtype in DTYPES:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.Tanh(), nn.Conv2d(16, 32, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 6)
        ).to(device)
        images = torch.randn(24, 3, 16, 16).to(device)
        labels = torch.arange(24, device=device) % 6
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        with torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(images)
            loss = functional.cross_entropy(logits, labels)
        scaler.scale(loss).backward()
        results.append((logits.detach().double(), model[0].weight.grad.double() / scaler.get_scale()))
    errors = [
        [((part - full).norm() / full.norm()).item() for part, full in zip(result, results[0], strict=True)]
        for result in results
    ]
    row("  error of a network's logits", [f"{error[0]:.3%}" for error in errors])
    row("  error of its first gradient", [f"{error[1]:.3%}" for error in errors])
    ratio = errors[1][0] / errors[2][0]
    print(f"  bfloat16 rounds the logits {ratio:.1f} times as coarsely as float16 (formats: 8)")
    assert 3 < ratio < 20 and errors[1][1] > errors[2][1], (
        "bfloat16 does not round several times as coarsely as float16"
    )


def overflow_in_a_layer(device):
    """Let the activation of one wide layer pass 65504; everything after it is inf or NaN."""
    ends = []
    for dtype in DTYPES:
        layer = nn.Linear(512, 8, bias=False, device=device)
        nn.init.constant_(layer.weight, 3.0)
        with torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            ends.append(layer(torch.full((1, 512), 50.0, device=device))[0, 0].item())
    row("  512 products of 3 and 50, added", [f"{end:.0f}" for end in ends])
    assert ends == [76800, 76800, float("inf")], "the sum of 76800 did not overflow in float16 alone"


def main(device):
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # compare with float32, not with TF32
    row(f"1. Range and digits ({device})", [str(dtype)[6:] for dtype in DTYPES])
    formats()
    range_and_digits(device)
    print("2. Range at work: a layer that overflows")
    overflow_in_a_layer(device)
    print("3. Digits at work: sums, weights, a network")
    sums = running_sum(device)
    small_update(device)
    network_error(device)
    print("RULE: bfloat16 for range, float16 plus scaler for digits, float32 for weights.")
    return f"{sums[1]:.0f} and {sums[2]:.0f}"


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
