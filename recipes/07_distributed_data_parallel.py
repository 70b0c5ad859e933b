"""Recipe 7: DistributedDataParallel, one process per device.

Rule: nothing changes. One device per process, a scaler in each; let DDP average the gradients within backward().
Why: DDP averages the scaled gradients before the scaler looks at them. An inf on one rank is an inf on all, so
every rank skips the same update and halves its scale: weights and scales stay equal without a message.
When it is broken: gradients summed by hand after unscale_. The rank that overflowed skips; the others have
already passed the check, step with the inf that arrives late, and end as NaN.
"""

import argparse
import os
import sys
import tempfile

import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

QUESTION = """One of two DDP processes overflows in an update. How many of the two skip it?"""
WORLD = 2
UPDATES = 5
BAD_UPDATE = 2


def make_model(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 6)).to(device)


def sum_by_hand(model):
    for parameter in model.parameters():
        distributed.all_reduce(parameter.grad)
        parameter.grad /= WORLD


def train(rank, device, dtype, broken):
    """Return a line per update: loss, scale, skipped, and the sum of the weights."""
    kind = torch.device(device).type
    model = make_model(device)
    network = model if broken else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(kind, init_scale=4096.0, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(10 + rank)
    diary = []
    for update in range(UPDATES):
        images = torch.randn(24, 32, generator=generator)
        labels = torch.arange(24) % 6
        if update == BAD_UPDATE and rank == 1:
            images[0, 0] = 1e6  # beyond float16 for rank 1 alone
        optimizer.zero_grad()
        with torch.amp.autocast(kind, dtype=dtype):
            loss = functional.cross_entropy(network(images.to(device)), labels.to(device))
        scale = scaler.get_scale()
        scaler.scale(loss).backward()  # DDP averages the gradients in here
        scaler.unscale_(optimizer)
        if broken:
            sum_by_hand(model)  # too late: this rank's check for inf is done
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        weights = nn.utils.parameters_to_vector(model.parameters()).double().sum().item()
        diary.append((loss.item(), scale, scaler.get_scale() < scale, weights))
    return diary


def work(rank, device, init_file, results):
    distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=WORLD)
    if device == "cuda":  # gloo also works where both ranks share one GPU; with a GPU each, take nccl
        device = f"cuda:{rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    cases = {"right": (torch.float16, False), "bfloat16": (torch.bfloat16, False), "broken": (torch.float16, True)}
    for name, (dtype, broken) in cases.items():
        results.put((name, rank, train(rank, device, dtype, broken)))
    distributed.barrier()
    distributed.destroy_process_group()
    # gloo's threads outlive the group; one that drops a tensor while Python shuts down aborts the process.
    os._exit(0)


def show(title, ranks):
    print(title)
    print("          rank 0                              rank 1")
    print("  update    loss  scale         weights         loss  scale         weights")
    for update, rows in enumerate(zip(*ranks, strict=True)):
        cells = [
            f"{loss:8.4f}  {scale:5.0f} {'skip' if skip else '':4} {weights:11.6f}"
            for loss, scale, skip, weights in rows
        ]
        print(f"  {update:6}{cells[0]}     {cells[1]}")


def main(device):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(work, (device, f"{folder}/init", results), nprocs=WORLD, start_method="spawn")
    runs = {"right": [None, None], "bfloat16": [None, None], "broken": [None, None]}
    while not results.empty():
        name, rank, diary = results.get()
        runs[name][rank] = diary

    show(f"1. float16; rank 1 overflows in update {BAD_UPDATE} ({WORLD} processes, {device})", runs["right"])
    first, second = runs["right"]
    assert [row[1:] for row in first] == [row[1:] for row in second], "the two ranks differ in scale, skips or weights"
    assert [row[2] for row in first] == [update == BAD_UPDATE for update in range(UPDATES)], (
        "the update that overflowed on one rank is not the one that both skipped"
    )
    show("2. bfloat16 has the range for that input: no scaler, no skip", runs["bfloat16"])
    assert [row[3] for row in runs["bfloat16"][0]] == [row[3] for row in runs["bfloat16"][1]], (
        "the weights of the two ranks differ in bfloat16"
    )
    show("3. Broken: gradients summed by hand after unscale_", runs["broken"])
    first, second = runs["broken"]
    assert not first[BAD_UPDATE][2] and second[BAD_UPDATE][2], (
        "summed after unscale_, both ranks skipped or none did: rank 1 should skip alone"
    )
    assert first[BAD_UPDATE][3] != first[BAD_UPDATE][3], "rank 0 should have taken a step with NaN"
    print("RULE: unchanged code; DDP averages inside backward, so all ranks skip together.")
    return (
        f"{sum(rows[BAD_UPDATE][2] for rows in runs['right'])}: the average of their gradients is not finite on either"
    )


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
