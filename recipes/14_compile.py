"""Recipe 14: torch.compile with AMP.

Rule: compile the model, keep autocast and scaler outside as ever, and set
torch._functorch.config.backward_pass_autocast = "off" when backward() is called outside autocast.
Why: compile traces the backward pass in advance and, by default, under the autocast that forward ran in. Eager
backward runs without; so a layer you keep in float32 gets its gradient in 16 bits once it is compiled.
When it is broken: nothing fails. Every value of a float32 layer's gradient fits into 16 bits exactly.
--backend aot_eager (default) traces like the real one but needs no compiler; --backend inductor is the real
one: half a minute for the first compilation on a CPU.
"""

import argparse
import sys

import torch
import torch._functorch.config as functorch_config
from torch import nn
from torch.nn import functional

QUESTION = """A layer is kept in float32 inside a bfloat16 model, which is compiled with the default setting.
What share of that layer's gradient fits into 16 bits exactly?"""


class Net(nn.Module):
    """A classifier with one layer kept in float32, as one does with a layer that overflows."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.delicate = nn.Linear(64, 64)
        self.last = nn.Linear(64, 6)

    def forward(self, images):
        hidden = torch.tanh(self.first(images))
        with torch.amp.autocast(images.device.type, enabled=False):
            hidden = torch.tanh(self.delicate(hidden.float()))
        return self.last(hidden)


def train(device, dtype, backend=None, policy="off", updates=4):
    """Return the losses, and the scaled gradient of the float32 layer in the first update."""
    torch.manual_seed(0)
    model = Net().to(device)
    images = torch.randn(48, 64).to(device)
    labels = torch.arange(6).repeat(8).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=dtype == torch.float16)
    torch.compiler.reset()
    losses = []
    first_gradient = None
    with functorch_config.patch(backward_pass_autocast=policy):
        network = model if backend is None else torch.compile(model, backend=backend)
        for _ in range(updates):
            optimizer.zero_grad()
            with torch.amp.autocast(device, dtype=dtype):
                loss = functional.cross_entropy(network(images), labels)
            scaler.scale(loss).backward()
            if first_gradient is None:
                first_gradient = model.delicate.weight.grad.clone()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    return losses, first_gradient


def share_in_16_bits(gradient, dtype):
    """Return the share of float32 values that are also exact in `dtype`: near 0 for a real float32 result."""
    return (gradient.to(dtype).float() == gradient).float().mean().item()


def compare(device, dtype, backend):
    eager_losses, eager = train(device, dtype)
    rows = {"eager": (eager_losses, eager)}
    for policy in ("same_as_forward", "off"):
        rows[f"compiled, {policy}"] = train(device, dtype, backend, policy)
    shares = {}
    for name, (losses, gradient) in rows.items():
        shares[name] = share_in_16_bits(gradient, dtype)
        error = ((gradient - eager).norm() / eager.norm()).item()
        print(
            f"  {str(dtype)[6:]:<8} {name:<25} "
            + " ".join(f"{loss:.4f}" for loss in losses)
            + f"  {shares[name]:6.1%}  {error:.2%}"
        )
        assert max(abs(one - two) for one, two in zip(losses, eager_losses, strict=True)) < 0.01, (
            "a compiled run's losses are not those of the eager one"
        )
    assert shares["compiled, same_as_forward"] == 1 and max(shares["eager"], shares["compiled, off"]) < 0.05, (
        "gradients are in 16 bits elsewhere than in the compiled run with same_as_forward"
    )
    return shares["compiled, same_as_forward"]


def main(device, backend):
    try:
        torch.compile(lambda values: values + 1, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # a missing C++ compiler, Python headers or Triton all look different
        first_line = next(iter(str(error).splitlines()), "")
        print(f"torch.compile does not work here: {type(error).__name__}: {first_line[:120]}")
        print("Nothing to show; try --backend aot_eager, which needs no compiler.")
        return "nothing: there is no compiler here"
    print(f"1. A layer kept in float32, eager and with {backend} ({device})")
    print(f"  {'':<34} {'losses':<27}  16-bit   error")
    for dtype in (torch.bfloat16, torch.float16):
        share = compare(device, dtype, backend)
    print("  16-bit: share of that layer's gradient that fits into 16 bits exactly;")
    print("  error: against eager (inductor also rounds elsewhere, as it fuses)")
    print("RULE: compile the model, autocast outside; backward_pass_autocast = 'off'.")
    return f"{share:.1%}: its backward pass ran in 16 bits"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("aot_eager", "inductor"), default="aot_eager")
    parser.add_argument("--quiz", action="store_true", help="ask a question first, then run and answer it")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; leave --device out to run on the CPU")
    if args.quiz:
        print(f"{QUESTION}\nYour guess: ", end="", flush=True)
        guess = sys.stdin.readline().strip() or "nothing"
        print()
    answer = main(args.device, args.backend)
    if args.quiz:
        print(f"You guessed: {guess}\nMeasured:    {answer}")
