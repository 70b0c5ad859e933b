"""Recipe 22: float8 training of large linear layers, with torchao.

Rule: take float8 for linear layers with thousands of rows and columns on a GPU of capability 8.9 or later (Ada,
Hopper, Blackwell). Autocast knows no float8: torchao (or Transformer Engine) exchanges the layers, the weights stay
float32, autocast runs the rest in bfloat16.
Why: Tensor Cores multiply 8 bits twice as fast as 16. Finding a scale for each tensor and casting costs a pass over
memory, which only a large product pays back.
When it is broken: small layers get slower, not faster. A tensor with one outlier wastes the range of its scale:
then a scale for each row keeps the digits.
Without such a GPU the arithmetic is emulated; without torchao (pip install torchao) that part is skipped.
Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433
"""

import argparse
import importlib.util
import sys
import warnings

import torch
from torch import nn

QUESTION = """An activation of ordinary numbers holds one value of 100,000. By how many percent does a product in
E4M3 err for all others, with one scale for the whole tensor?"""
SMALL = 2.0**-12  # keeps an all-zero row from a scale of infinity


def to_float8(values, dim=None):
    """Values as E4M3 holds them under one scale, or under one for each row or column along `dim`."""
    largest = values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)
    scale = torch.finfo(torch.float8_e4m3fn).max / largest.clamp(min=SMALL)
    return (values * scale).to(torch.float8_e4m3fn).float() / scale


def scales_and_outliers(device):
    """Error of a product, for an even activation and for one with an outlier."""
    torch.manual_seed(0)
    weight = torch.randn(256, 512, device=device) / 16
    activation = torch.randn(128, 512, device=device)
    errors = {}
    print("                           one scale   a scale for each row")
    for name, first in (("even activation", 1.0), ("one value of 100,000", 1e5)):
        activation[0, 0] = first
        exact = activation @ weight.T
        rows = slice(1, None)  # the outlier's own row aside
        cells = []
        for dim in (None, 1):
            result = to_float8(activation, dim) @ to_float8(weight, dim).T
            cells.append(((result - exact)[rows].norm() / exact[rows].norm()).item())
        errors[name] = cells
        print(f"  {name:<24}{cells[0]:>10.1%}{cells[1]:>14.1%}")
    even, outlier = errors.values()
    assert max(even) < 0.06 and outlier[1] < 0.06 < 0.1 < outlier[0], (
        "an even activation lost digits, or the outlier spoilt rows of their own scale, or spared the one scale"
    )
    return outlier


def gpu_multiplies_eight_bits(device):
    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)


def make_model(device, width, float8):
    """Two linear layers; with `float8` torchao's, emulated where the device does not multiply 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)).to(device)
    if float8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        convert_to_float8_training(model, config=Float8LinearConfig(emulate=not gpu_multiplies_eight_bits(device)))
    return torch.compile(model) if gpu_multiplies_eight_bits(device) else model


def train(device, float8, updates=20):
    """Train a regression of two layers; return first and last loss and the type of the weights."""
    model = make_model(device, 64, float8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = torch.randn(256, 64, device=device)
    target = images.flip(1)
    losses = []
    for _ in range(updates):
        optimizer.zero_grad()
        with torch.amp.autocast(device, dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(model(images).float(), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1], str(next(model.parameters()).dtype)[6:]


def milliseconds(device, width, float8):
    """Forward and backward of 16,384 rows: median of 10 after a warm-up."""
    model = make_model(device, width, float8)
    images = torch.randn(16384, width, device=device)
    times = []
    for _ in range(13):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        with torch.amp.autocast(device, dtype=torch.bfloat16):
            loss = model(images).float().square().mean()
        loss.backward()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return sorted(times[3:])[5]


def with_torchao(device):
    ends = {name: train(device, float8) for name, float8 in (("bfloat16", False), ("float8", True))}
    for name, (first, last, dtype) in ends.items():
        print(f"  {name:<9} loss {first:.4f} -> {last:.4f}, weights {dtype}")
        assert dtype == "float32" and last < 0.8 * first, "weights are not float32, or the loss did not fall"
    assert abs(ends["float8"][1] / ends["bfloat16"][1] - 1) < 0.1, "float8 does not end at about bfloat16's loss"
    if not gpu_multiplies_eight_bits(device):
        print("  emulated: this device does not multiply 8 bits, so there is no time to measure")
        return
    print("  width     bfloat16       float8   (ms, forward and backward of 16,384 rows)")
    for width in (256, 1024, 4096):
        times = [milliseconds(device, width, float8) for float8 in (False, True)]
        print(f"  {width:<6}{times[0]:>12.2f}{times[1]:>13.2f}   {times[0] / times[1]:.2f} times as fast")


def main(device):
    print(f"1. One scale, or one for each row ({device})")
    error = scales_and_outliers(device)
    print("2. torchao's float8 layers under autocast to bfloat16")
    if importlib.util.find_spec("torchao") is None:
        print("  skipped: torchao is not installed (pip install torchao)")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with_torchao(device)
    print("RULE: float8 for large linear layers on Ada and later; measure, scale by row.")
    return f"{error[0]:.0%}, against {error[1]:.1%} with a scale for each row"


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
