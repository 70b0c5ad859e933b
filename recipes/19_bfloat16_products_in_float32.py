"""Recipe 19: bfloat16 products inside float32.

Rule: `fp32_precision` rounds the factors of products and nothing else: "tf32" on NVIDIA GPUs, "bf16" on CPUs.
It may gain speed; it never gains memory. Without autocast, without a scaler.
Why: matrix units multiply short factors and add in float32. The switch lets them round the factors of a float32
product on the way in (TF32 keeps 10 bits of fraction, bfloat16 7). The result is float32 and stays so; autocast
also stores it in 16 bits, which is where the memory falls.
When it is broken: nothing fails. A device whose library has no such product ignores the switch, in silence (many
CPUs that are fast in bfloat16 do); and the memory stays where it was.
"""

import argparse
import sys
import time

import torch
from torch import nn
from torch.nn import functional

QUESTION = """257 ones times 257 ones, added up: 257 exactly. What comes out (1) of a bfloat16 product inside float32,
(2) of the same product under autocast to bfloat16?"""


def switch(device):
    """Where this device's float32 products are configured, and the name of its shorter factors."""
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    return backend.matmul, "tf32" if device == "cuda" else "bf16"


def multiply(device, left, right, name):
    """Compute a float32 product with the switch set to `name`, and set it back to "ieee"."""
    products, _ = switch(device)
    products.fp32_precision = name
    result = left @ right
    products.fp32_precision = "ieee"
    return result


def round_factors(left, right):
    """Compute a bfloat16 product inside float32: short factors, long sum. Works on any device."""
    return left.bfloat16().float() @ right.bfloat16().float()


def autocast_product(device, left, right):
    with torch.amp.autocast(device, dtype=torch.bfloat16):
        return left @ right


def two_plain_numbers(device):
    ones = torch.ones(1, 257, device=device)
    inside = round_factors(ones, ones.T).item()
    autocast = autocast_product(device, ones, ones.T).item()
    print(f"  257 ones times 257 ones     inside float32: {inside:g}   autocast: {autocast:g}")
    digit = torch.tensor([[1.001]], device=device)
    one = torch.ones(1, 1, device=device)
    print(
        f"  1.001 times 1               inside float32: {round_factors(digit, one).item():g}     "
        f"autocast: {autocast_product(device, digit, one).item():g}"
    )
    assert (inside, autocast) == (257, 256) and round_factors(digit, one).item() == 1, (
        "factors rounded inside float32 do not give 257 and 1, or autocast does not give 256"
    )
    return inside, autocast


def errors(device):
    """Return the error of each way against float64, by name."""
    torch.manual_seed(0)
    left = torch.randn(512, 512, device=device)
    right = torch.randn(512, 512, device=device)
    exact = left.double() @ right.double()
    _, short = switch(device)
    results = {
        'float32, "ieee"': multiply(device, left, right, "ieee"),
        f'float32, "{short}"': multiply(device, left, right, short),
        "factors rounded by hand": round_factors(left, right),
        "autocast to bfloat16": autocast_product(device, left, right),
    }
    if device == "cpu":
        results['float32, "tf32"'] = multiply(device, left, right, "tf32")
    found = {}
    print(f"  {'512 x 512 x 512':<28}{'result':>10}{'error':>12}")
    for name, result in results.items():
        found[name] = ((result.double() - exact).norm() / exact.norm()).item()
        print(f"  {name:<28}{str(result.dtype)[6:]:>10}{found[name]:>12.2e}")
    assert found['float32, "ieee"'] < 1e-6 < 1e-3 < found["factors rounded by hand"] < found["autocast to bfloat16"], (
        "float32's product is not exact, or rounding by hand is not better than autocast"
    )
    return found


def bytes_kept(device, name, autocast):
    """Bytes that a small network keeps for its backward pass."""
    products, _ = switch(device)
    products.fp32_precision = name
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)], nn.Linear(256, 6)).to(device)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    images = torch.randn(1024, 256, device=device)
    kept = {}

    def pack(tensor):
        if tensor.ndim > 1 and tensor.untyped_storage().data_ptr() not in weights and len(tensor) == len(images):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.amp.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            logits = model(images)
        loss = functional.cross_entropy(logits.float(), torch.arange(1024, device=device) % 6)
        loss.backward()
    products.fp32_precision = "ieee"
    return sum(kept.values())


def milliseconds(device, call):
    """Median of five, after a warm-up."""
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return 1000 * sorted(seconds[1:])[2]


def speed(device, short):
    left = torch.randn(1024, 1024, device=device)
    for name, call in {
        '"ieee"': lambda: multiply(device, left, left, "ieee"),
        f'"{short}"': lambda: multiply(device, left, left, short),
        "autocast": lambda: autocast_product(device, left, left),
    }.items():
        print(f"  {name:<10}{milliseconds(device, call):8.1f} ms")


def main(device):
    _, short = switch(device)
    print(f"1. What is rounded ({device})")
    inside, autocast = two_plain_numbers(device)
    print('2. What this device does when it is asked for "' + short + '"')
    found = errors(device)
    obeys = found[f'float32, "{short}"'] > 1e-5
    print(f"  this device {'obeys: factors are rounded' if obeys else 'ignores it: no factor is rounded'}")
    if device == "cpu":
        ignored = found['float32, "tf32"']
        print(f'  "tf32" on a CPU is accepted and changes nothing: error {ignored:.1e}')
        assert ignored < 1e-6, '"tf32" changed a product on a CPU'
    print("3. Broken: waiting for the memory to fall")
    sizes = [bytes_kept(device, "ieee", False), bytes_kept(device, short, False), bytes_kept(device, "ieee", True)]
    print(f'  bytes kept: "ieee" {sizes[0]:,}, "{short}" {sizes[1]:,}, autocast {sizes[2]:,}')
    assert sizes[0] == sizes[1] > 1.5 * sizes[2], "the switch changed the memory that is kept, or autocast did not"
    print("4. Speed of 1024 x 1024 x 1024 here (measured, nothing is claimed)")
    speed(device, short)
    print("RULE: fp32_precision rounds factors; only autocast stores 16 bits. Measure both.")
    return f"(1) {inside:g}, (2) {autocast:g}: autocast also rounds the sum"


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
