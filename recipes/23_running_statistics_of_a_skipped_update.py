"""Recipe 23: the running statistics of an update that was skipped.

Rule: put BatchNorm's buffers back as they were before an update that the scaler skips.
Why: the scaler skips the optimizer's step. But the forward pass has already moved running_mean and running_var
towards the statistics of its batch. If an activation overflowed, these are inf or NaN, and
0.9 * NaN + 0.1 * x is NaN, however good x is.
When it is broken: the training goes on as if nothing had happened, because BatchNorm uses the batch's own
statistics there. Each evaluation is NaN from then on, in every precision, after a resume too. A moving average of
the weights (EMA) takes the NaN over.
"""

import argparse
import sys

import torch
from torch import nn

QUESTION = """A float16 training of 40 updates meets one batch that overflows. The scaler skips that update.
BatchNorm's momentum is 0.1. After how many clean updates is an evaluation finite again?"""

UPDATES = 40
LOUD = 5  # the update whose batch overflows: 1,000,000 is beyond 65,504, float16's largest


def make_parts(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)).to(device)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batch(update, device, loud=False):
    """Points whose largest of three coordinates is the class."""
    generator = torch.Generator().manual_seed(update)
    points = torch.randn(64, 8, generator=generator).to(device)
    labels = points[:, :3].argmax(1)
    return points * 1e6 if loud else points, labels


def put_back_if_skipped(model, before, gradients):
    """Chooses on the device, with no `if`: a CPU that asks for the flag would wait for the GPU in every update."""
    finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
    for buffer, old in zip(model.buffers(), before, strict=True):  # num_batches_tracked is one, too
        buffer.copy_(torch.where(finite, buffer, old))


def train(device, dtype, *, loud=LOUD, cured=False):
    """Return the model, its moving average, the losses of training, and how many updates were skipped."""
    model, optimizer = make_parts(device)
    average, _ = make_parts(device)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=dtype == torch.float16)
    losses, skipped = [], 0
    for update in range(UPDATES):
        points, labels = batch(update, device, update == loud)
        before = [buffer.clone() for buffer in model.buffers()]
        optimizer.zero_grad()
        with torch.amp.autocast(device, dtype=dtype):
            loss = nn.functional.cross_entropy(model(points), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if cured:
            put_back_if_skipped(model, before, [parameter.grad for parameter in model.parameters()])
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        losses.append(loss.item())
        with torch.no_grad():
            for own, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                own.copy_(0.9 * own + 0.1 * new)
    return model, average, losses, skipped


def evaluate(model, device, dtype=torch.float32):
    """Return the loss on new points, with the running statistics."""
    points, labels = batch(1000, device)
    with torch.no_grad(), torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        return nn.functional.cross_entropy(model.eval()(points), labels).item()


def finite(values):
    return all(bool(torch.as_tensor(value).isfinite().all()) for value in values)


def main(device):
    half = torch.float16
    print(f"1. Broken: one loud batch in {UPDATES} float16 updates ({device})")
    model, average, losses, skipped = train(device, half)
    print(f"  skipped updates {skipped}, training loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"  weights finite: {finite(model.parameters())}, running_var[0]: {model[1].running_var[0].item()}")
    assert skipped == 1 and losses[-1] < losses[0] and finite(model.parameters()), (
        "not one update was skipped, or the loss of training did not fall, or a weight is not finite"
    )
    print("2. No precision mends it, nor does an average")
    for name, tested, dtype in (("float16", model, half), ("float32", model, torch.float32)):
        print(f"  evaluation in {name}: {evaluate(tested, device, dtype)}")
        assert not finite([evaluate(tested, device, dtype)]), "an evaluation with spoilt running statistics is finite"
    print(f"  of the moving average: {evaluate(average, device)}")
    assert not finite([evaluate(average, device)]), "the average of spoilt running statistics is finite"
    print(f"3. Still so after {UPDATES - LOUD - 1} clean updates")
    clean = finite(model[1].buffers())
    print(f"  running statistics finite: {clean}")
    assert not clean, "clean updates made the running statistics finite again"
    print("4. Cured: the buffers are put back")
    cured, average, losses, skipped = train(device, half, cured=True)
    loss = evaluate(cured, device)
    print(f"  skipped updates {skipped}, evaluation {loss:.3f}, of the average {evaluate(average, device):.3f}")
    counted = cured[1].num_batches_tracked.item()
    print(f"  batches that BatchNorm counts: {counted} of {UPDATES}")
    assert skipped == 1 and loss < 0.5 and finite([evaluate(average, device)]) and counted == UPDATES - 1, (
        "with buffers put back an evaluation is bad, or not one update was skipped, or it was counted"
    )
    print("5. bfloat16 has the range: nothing is skipped, and the loud batch fades slowly")
    model, _, _, skipped = train(device, torch.bfloat16)
    loss = evaluate(model, device)
    largest = model[1].running_var.max().item()
    print(f"  evaluation {loss:.3f} (a guess has ln 3 = 1.099), running_var up to {largest:.1e}")
    assert skipped == 0 and 1 < loss < 1.2, (
        "bfloat16 skipped an update, or its evaluation is no longer as good as a guess"
    )
    print("RULE: a skipped update must leave no trace, in BatchNorm's buffers neither.")
    return f"after none: it is NaN after all {UPDATES - LOUD - 1} that followed"


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
