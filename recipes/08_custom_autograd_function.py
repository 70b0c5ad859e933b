"""Recipe 8: your own autograd functions.

Rule: decorate forward with custom_fwd and backward with custom_bwd, both with device_type=. A function that
needs float32 says custom_fwd(cast_inputs=torch.float32): autocast is then off within it.
Why: backward runs outside your autocast region. custom_bwd gives it the state that forward had.
When it is broken: "expected m1 and m2 to have the same dtype" in backward, or, without an error, an inf from
a function that was only ever tested in float32.
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional

QUESTION = """The mean of the squares of 64 numbers from 100 to 400 is 70243. What is it in float16?"""


def make_functions(device):
    """Return the same two functions, with and without the decorators."""

    class NakedMatmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, left, right):
            ctx.save_for_backward(left, right)
            return left @ right

        @staticmethod
        def backward(ctx, gradient):
            left, right = ctx.saved_tensors
            return gradient @ right.t(), left.t() @ gradient

    class Matmul(NakedMatmul):
        forward = staticmethod(torch.amp.custom_fwd(NakedMatmul.forward, device_type=device))
        backward = staticmethod(torch.amp.custom_bwd(NakedMatmul.backward, device_type=device))

    class NakedEnergy(torch.autograd.Function):
        """Mean of squares; 300 squared is above 65504, the largest float16."""

        @staticmethod
        def forward(ctx, values):
            ctx.save_for_backward(values)
            return (values * values).mean()

        @staticmethod
        def backward(ctx, gradient):
            (values,) = ctx.saved_tensors
            return gradient * 2 * values / values.numel()

    class Energy(NakedEnergy):
        forward = staticmethod(torch.amp.custom_fwd(NakedEnergy.forward, device_type=device, cast_inputs=torch.float32))
        backward = staticmethod(torch.amp.custom_bwd(NakedEnergy.backward, device_type=device))

    return NakedMatmul, Matmul, NakedEnergy, Energy


def train(device, dtype, matmul, updates=5):
    """Build a classifier with the custom function as its last layer."""
    torch.manual_seed(0)
    first = nn.Linear(32, 64).to(device)
    weight = nn.Parameter(torch.randn(64, 6).mul(0.1).to(device))
    images = torch.randn(48, 32).to(device)
    labels = torch.arange(48, device=device) % 6
    optimizer = torch.optim.SGD([*first.parameters(), weight], lr=0.2)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    for _ in range(updates):
        optimizer.zero_grad()
        with torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits = matmul(torch.relu(first(images)), weight)
            loss = functional.cross_entropy(logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return logits.dtype, loss.item()


def without_a_required_dtype(device, naked, decorated):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        seen, loss = train(device, dtype, decorated.apply)
        reference = train(device, dtype, torch.matmul)[1]
        print(f"  {str(dtype)[6:]:<9} output {str(seen)[6:]:<9} loss {loss:.4f}   torch.matmul: {reference:.4f}")
        assert seen == dtype and abs(loss - reference) < 1e-3, (
            "the function's output is not in autocast's dtype, or its loss is not torch.matmul's"
        )
    try:
        train(device, torch.float16, naked.apply)
    except RuntimeError as error:
        print(f"  without the decorators, in backward:\n    {error}")
    else:
        raise AssertionError("the undecorated function survived its backward pass")


def with_a_required_dtype(device, naked, decorated):
    values = torch.linspace(100, 400, 64, device=device, dtype=torch.float16).requires_grad_()
    results = {}
    for name, function in (("naked", naked), ("cast_inputs=float32", decorated)):
        with torch.amp.autocast(device, dtype=torch.float16):
            results[name] = function.apply(values)
        (gradient,) = torch.autograd.grad(results[name], values)
        print(
            f"  {name:<20} {results[name].item():>9.1f} {str(results[name].dtype)[6:]}, "
            f"gradient {str(gradient.dtype)[6:]}, largest {gradient.max().item():.2f}"
        )
    truth = values.detach().double().pow(2).mean().item()
    print(f"  the true mean of squares is {truth:.1f}")
    assert torch.isinf(results["naked"]) and abs(results["cast_inputs=float32"].item() / truth - 1) < 1e-5, (
        "the naked function did not overflow, or cast_inputs=float32 did not give the true mean"
    )
    outside = decorated.apply(values)
    print(f"  outside autocast cast_inputs does nothing: {outside.item()} {str(outside.dtype)[6:]}")
    assert torch.isinf(outside), "cast_inputs acted outside autocast"
    return results["naked"].item()


def main(device):
    naked_matmul, matmul, naked_energy, energy = make_functions(device)
    print(f"1. A function that takes any dtype ({device})")
    without_a_required_dtype(device, naked_matmul, matmul)
    print("2. A function that needs float32, fed with float16")
    naked_result = with_a_required_dtype(device, naked_energy, energy)
    print("RULE: custom_fwd and custom_bwd; cast_inputs=torch.float32 where range matters.")
    return f"{naked_result:g}; with cast_inputs=torch.float32 it is right"


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
