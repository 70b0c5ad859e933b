"""Recipe 12: autocast's op lists, seen live.

Rule: don't cast by hand inside autocast. It has a list of operations for 16 bits (products, convolutions),
one for float32 (losses and other delicate sums), one for "the widest of the inputs"; the rest takes what comes.
Why: the lists differ between CPU and CUDA and between versions, so look, don't remember.
When it is broken: an operation with out= is not cast; a dtype error names two dtypes you did not choose.
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

QUESTION = (
    """Under autocast to bfloat16, torch.mm(a, b) runs in bfloat16. In which dtype does torch.mm(a, b, out=c) run?"""
)


class Watch(TorchDispatchMode):
    """Notes every operation that really runs, with the dtypes it gets and gives."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()]
        outputs = result if isinstance(result, (tuple, list)) else [result]
        outputs = [out for out in outputs if isinstance(out, torch.Tensor) and out.is_floating_point()]
        if inputs and outputs:
            dtypes = [str(tensors[0].dtype)[6:] for tensors in (inputs, outputs)]
            self.calls.append((function.overloadpacket.__name__, *dtypes))
        return result


def one_forward(device, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)
    ).to(device)
    images = torch.randn(4, 3, 8, 8, device=device)
    labels = torch.arange(4, device=device)
    with torch.amp.autocast(device, dtype=dtype), Watch() as watch:
        functional.cross_entropy(model(images), labels)
    for name, taken, given in watch.calls:
        note = "   <- a cast that autocast put in" if name == "_to_copy" else ""
        print(f"  {name:<24} {taken:>9} -> {given}{note}")
    return watch.calls


def probes(device):
    """One call for each operation; the first argument carries the dtype under test."""
    weight = torch.randn(4, 3, device=device)
    square = torch.randn(3, 3, device=device)
    image_weight = torch.randn(2, 1, 3, 3, device=device)
    return {
        "linear": lambda values: functional.linear(values, weight),
        "matmul": lambda values: values @ square,
        "conv2d": lambda values: functional.conv2d(values[None, None], image_weight),
        "attention": lambda values: functional.scaled_dot_product_attention(*[values[None]] * 3),
        "relu": torch.relu,
        "softmax": lambda values: values.softmax(1),
        "layer_norm": lambda values: functional.layer_norm(values, (3,)),
        "exp": torch.exp,
        "sum": torch.sum,
        "mse_loss": lambda values: functional.mse_loss(values, torch.zeros_like(values)),
        "cross_entropy": lambda values: functional.cross_entropy(
            values, torch.zeros(3, dtype=torch.long, device=device)
        ),
        "cat with float32": lambda values: torch.cat([values, square]),
        "add float32": lambda values: values + square,
    }


def verdict(from_full, from_half, half):
    if (from_full, from_half) == (half, half):
        return "runs in 16 bits"
    if (from_full, from_half) == ("float32", "float32"):
        return "float32 or widest input"
    return "follows its input"


def sort_operations(device, dtype):
    half = str(dtype)[6:]
    verdicts = {}
    print(f"  {'operation':<18}{'from float32':<15}{'from ' + half:<16}it")
    with torch.amp.autocast(device, dtype=dtype):
        for name, call in probes(device).items():
            values = torch.rand(3, 3, device=device)
            given = [str(call(values.to(kind)).dtype)[6:] for kind in (torch.float32, dtype)]
            verdicts[name] = verdict(*given, half)
            print(f"  {name:<18}{given[0]:<15}{given[1]:<16}{verdicts[name]}")
    return verdicts


def broken_out_argument(device):
    left = torch.randn(4, 4, device=device)
    right = torch.randn(4, 4, device=device)
    out = torch.empty(4, 4, device=device)
    with torch.amp.autocast(device, dtype=torch.bfloat16), Watch() as watch:
        torch.mm(left, right)
        torch.mm(left, right, out=out)
    products = [given for name, _, given in watch.calls if name == "mm"]
    print(f"  torch.mm(a, b): {products[0]};  torch.mm(a, b, out=c): {products[1]}, autocast keeps away")
    assert products == ["bfloat16", "float32"], (
        "autocast changed the type of a product with out=, or left that of one without"
    )
    return products[1]


def broken_probabilities(device):
    """BCE on probabilities is the one loss autocast refuses (CUDA); with logits it is safe everywhere."""
    probabilities = torch.rand(8, device=device)
    target = torch.ones(8, device=device)
    with torch.amp.autocast(device, dtype=torch.float16):
        try:
            answer = str(functional.binary_cross_entropy(probabilities, target).dtype)[6:]
        except RuntimeError as error:
            answer = str(error).splitlines()[0]
        logits = functional.binary_cross_entropy_with_logits(probabilities.half(), target)
    print(f"  binary_cross_entropy here: {answer}\n  with_logits: {str(logits.dtype)[6:]}")
    assert logits.dtype == torch.float32 and (device == "cuda") == ("unsafe" in answer), (
        "the loss on logits is not float32, or the one on probabilities is refused elsewhere than on CUDA"
    )


def main(device):
    print(f"1. A forward pass as it runs under autocast to float16 ({device})")
    calls = one_forward(device, torch.float16)
    given = {name: dtype for name, _, dtype in calls}
    assert given["convolution"] == given["addmm"] == "float16" and given["_log_softmax"] == "float32", (
        "products are not in float16, or the loss is not in float32"
    )
    for number, half in enumerate((torch.float16, torch.bfloat16), 2):
        print(f"{number}. The lists, asked for {str(half)[6:]}")
        verdicts = sort_operations(device, half)
        assert (
            verdicts["linear"] == verdicts["conv2d"] == "runs in 16 bits" and verdicts["relu"] == "follows its input"
        ), "linear or conv2d does not run in 16 bits, or relu does not follow its input"
        assert verdicts["cross_entropy"] == "float32 or widest input" == verdicts["mse_loss"], (
            "cross_entropy or mse_loss does not run in float32"
        )
    print("4. Where autocast keeps away, and where it may refuse")
    dtype = broken_out_argument(device)
    broken_probabilities(device)
    print("RULE: let autocast choose, and look at what it chose on your device.")
    return f"{dtype}: autocast keeps away from out="


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
