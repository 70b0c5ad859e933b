"""Recipe 9: save and resume.

Rule: save model, optimizer and scaler together, after scaler.update(); load all three before going on.
Why: the scale and the count towards its next growth are part of the training state. Before update() the
scaler has seen an overflow but not yet reacted, and that is not in its state dict.
When it is broken: the resumed run skips updates at its start, or grows its scale at other times, so it is
nearly, but not exactly, the same run. Compare the weights bit by bit, as here.
"""

import argparse
import io
import sys

import torch
from torch import nn
from torch.nn import functional

QUESTION = """A float16 run has found its scale, 2**19. It stops and resumes without the state of its scaler.
With which power of two does it go on?"""
SAVE_AT = 9
UPDATES = 14


def make_parts(device, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 6)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**21, growth_interval=3, enabled=dtype == torch.float16)
    return model, optimizer, scaler


def run(device, dtype, parts, first, last):
    """Run updates first..last-1. The data depend only on the update's number, so that a resumed run gets the same."""
    model, optimizer, scaler = parts
    scales = []
    for update in range(first, last):
        generator = torch.Generator().manual_seed(update)
        images = torch.randn(48, 32, generator=generator).to(device)
        labels = (torch.arange(48) % 6).to(device)
        optimizer.zero_grad()
        with torch.amp.autocast(device, dtype=dtype):
            loss = functional.cross_entropy(model(images), labels)
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return scales


def save(parts):
    buffer = io.BytesIO()  # stands for a file
    names = ("model", "optimizer", "scaler")
    torch.save({name: part.state_dict() for name, part in zip(names, parts, strict=True)}, buffer)
    return buffer


def load(buffer, parts, with_scaler=True):
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)  # tensors and plain types only
    for name, part in zip(("model", "optimizer", "scaler"), parts, strict=True):
        if name != "scaler" or with_scaler:
            part.load_state_dict(state[name])
    return state["scaler"]


def difference(parts, others):
    vectors = [nn.utils.parameters_to_vector(some[0].parameters()) for some in (parts, others)]
    return (vectors[0] - vectors[1]).abs().max().item()


def resume(device, dtype, with_scaler=True):
    """Straight through against stop and go; returns the scales of both and the largest difference."""
    straight, stopped, resumed = (make_parts(device, dtype) for _ in range(3))
    scales = run(device, dtype, straight, 0, UPDATES)
    again = run(device, dtype, stopped, 0, SAVE_AT)
    state = load(save(stopped), resumed, with_scaler)
    again += run(device, dtype, resumed, SAVE_AT, UPDATES)
    return scales, again, difference(straight, resumed), state


def in_powers(scales):
    return " ".join(f"{torch.tensor(scale).log2().item():2.0f}" for scale in scales)


def saved_before_update(device):
    """Show the state between step() and update() of an update that overflowed."""
    model, optimizer, scaler = make_parts(device, torch.float16)
    with torch.amp.autocast(device, dtype=torch.float16):
        loss = model(torch.ones(8, 32, device=device)).float().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # skipped: the scale of 2**21 overflows
    early = scaler.state_dict()["scale"]
    scaler.update()
    late = scaler.state_dict()["scale"]
    print(f"  scale saved before update(): {early:.0f}, after: {late:.0f}")
    assert late == early / 2, "the scale saved before update() is not the one that overflowed"


def main(device):
    print(f"1. {UPDATES} updates straight, and stopped after {SAVE_AT}; scale as a power of 2 ({device})")
    scales, again, gap, state = resume(device, torch.float16)
    print(f"  straight        {in_powers(scales)}\n  resumed         {in_powers(again)}   difference {gap}")
    print(f"  what is saved:  scale {state['scale']:.0f}, growth tracker {state['_growth_tracker']}, factors, interval")
    assert scales == again and gap == 0.0, (
        "the resumed run is not exactly the straight one: its scales or weights differ"
    )
    assert resume(device, torch.bfloat16)[2] == 0.0, "the resumed run in bfloat16 is not exactly the straight one"
    print("  bfloat16 (scaler disabled, its state is {}): difference 0.0")
    print("2. Broken: the scaler's state is lost")
    scales, again, gap, _ = resume(device, torch.float16, with_scaler=False)
    print(f"  straight        {in_powers(scales)}\n  resumed         {in_powers(again)}   difference {gap:.4f}")
    assert scales != again and gap > 0 and again[SAVE_AT] == again[0], (
        "without the scaler's state the resumed run is the straight one, or does not begin at the first scale"
    )
    print("3. Broken: saved between step() and update()")
    saved_before_update(device)
    print("4. Broken: the state of a disabled scaler given to an enabled one")
    disabled = torch.amp.GradScaler(device, enabled=False).state_dict()
    try:
        torch.amp.GradScaler(device).load_state_dict(disabled)
    except RuntimeError as error:
        print(f"  {disabled}: RuntimeError: {str(error)[:33]}...\n  so load it only if it is not empty")
    else:
        raise AssertionError("an enabled scaler took an empty state")
    print("RULE: save the scaler too, after update(); load it unless its state is {}.")
    return f"2**{torch.tensor(again[SAVE_AT]).log2().item():.0f}, where every run begins: skips follow"


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
