"""Recipe 5: several models, losses and optimizers.

Rule: one scaler. Scale every loss, step every optimizer through the scaler, and call update() once, last.
Why: the optimizers skip on their own (each looks at its own gradients only), but they share one scale, and
that scale must not move between the backward pass and the last step.
When it is broken: update() between two steps makes the second optimizer divide by another scale than its
gradients were multiplied with. After a skip they are twice too large, and nothing is raised.
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional

QUESTION = """Two optimizers share a scaler, and the update of the first is skipped. Somebody calls update()
between the steps. How many times too long is the step of the second?"""


def make_parts(device, dtype=torch.float16):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 6)).to(device) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    scaler = torch.amp.GradScaler(device, init_scale=4096.0, enabled=dtype == torch.float16)
    images = torch.randn(48, 32).to(device)
    labels = torch.arange(6).repeat(8).to(device)
    return models, optimizers, scaler, images, labels


def backward_both(device, dtype, models, scaler, images, labels):
    """Two losses which both need both models, as in the PyTorch notes."""
    with torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        first, second = (model(images) for model in models)
        losses = [
            functional.cross_entropy(2 * first + 3 * second, labels),
            functional.cross_entropy(3 * first - 5 * second, labels),
        ]
    scaler.scale(losses[0]).backward(retain_graph=True)
    scaler.scale(losses[1]).backward()
    return [loss.item() for loss in losses]


def moved(model, before):
    return (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()


def one_update(device, dtype, overflow=False, update_between=False):
    """Return how far each model moved, and the scale before and after."""
    models, optimizers, scaler, images, labels = make_parts(device, dtype)
    before = [nn.utils.parameters_to_vector(model.parameters()).detach().clone() for model in models]
    backward_both(device, dtype, models, scaler, images, labels)
    scale = scaler.get_scale()
    if overflow:
        models[0][0].weight.grad[0, 0] = float("inf")  # stands for an overflow in model 0 alone
    scaler.step(optimizers[0])
    if update_between:
        scaler.update()
    scaler.step(optimizers[1])
    scaler.update()
    return [moved(*pair) for pair in zip(models, before, strict=True)], scale, scaler.get_scale()


def train(device, dtype, updates=10):
    models, optimizers, scaler, images, labels = make_parts(device, dtype)
    losses = []
    for _ in range(updates):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(backward_both(device, dtype, models, scaler, images, labels))
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    first = losses[0]
    last = losses[-1]
    print(f"  {str(dtype)[6:]:<9} losses {first[0]:.4f} {first[1]:.4f} -> {last[0]:.4f} {last[1]:.4f}")
    assert sum(last) < sum(first), "the losses did not fall"
    return sum(last)


def main(device):
    print(f"1. Ten updates, two losses, two optimizers, one scaler ({device})")
    results = [train(device, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert max(results) - min(results) < 0.05 * max(results), "the three precisions do not end at about the same loss"

    print("2. One update; model 0 overflows in the second and third row")
    print("                                      moved 0   moved 1    scale")
    clean = one_update(device, torch.float16)
    right = one_update(device, torch.float16, overflow=True)
    wrong = one_update(device, torch.float16, overflow=True, update_between=True)
    for name, (moves, before, after) in {
        "nothing overflows": clean,
        "overflow, one update() last": right,
        "overflow, update() in between": wrong,
    }.items():
        print(f"  {name:<32} {moves[0]:10.5f}{moves[1]:10.5f}    {before:.0f} -> {after:.0f}")
    assert right[0][0] == 0 and abs(right[0][1] - clean[0][1]) < 1e-6, (
        "the model that overflowed moved, or the other one did not"
    )
    assert right[2] == right[1] / 2, "one overflow did not halve the scale that both optimizers share"
    ratio = wrong[0][1] / clean[0][1]
    print(f"  with update() in between, optimizer 1 took a step {ratio:.2f} times too long")
    assert abs(ratio - 2) < 1e-3, "the step after an update() in between is not twice as long"
    print("RULE: one scaler; scale each loss, step each optimizer, then one update().")
    return f"{ratio:.2f} times: the scale was halved in between"


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
