"""Recipe 6: DataParallel, one process with several threads.

Rule: put autocast inside the module's forward, with its dtype. One scaler for the gathered loss, as usual.
Why: autocast's state belongs to the thread. A new thread starts without it; nn.DataParallel switches it on in
its threads, but hands over only "on", not the dtype: there, bfloat16 around the model becomes float16.
When it is broken: no speed-up and no memory saved (threads in float32), or overflows although bfloat16 was
asked for. Print the dtype of a hidden layer from within forward to see it.
"""

import argparse
import sys
import threading

import torch
from torch import nn
from torch.nn import functional

QUESTION = """autocast(float16) stands around a model that runs in threads, as nn.DataParallel runs it.
Which dtype does a hidden layer see?"""


class Net(nn.Module):
    """With `dtype`, forward sets up autocast itself; without, it relies on the caller."""

    def __init__(self, device, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 64)
        self.last = nn.Linear(64, 6)
        self.dtype = dtype
        self.seen = []
        self.to(device)

    def forward(self, images):
        if self.dtype is None:
            return self.layers(images)
        with torch.amp.autocast(images.device.type, dtype=self.dtype):
            return self.layers(images)

    def layers(self, images):
        hidden = torch.relu(self.first(images))
        self.seen.append(str(hidden.dtype)[6:])  # a list is shared by DataParallel's replicas
        return self.last(hidden)


def threaded(model, images, hand_over=False):
    """Do the work of nn.DataParallel without GPUs: a thread for each part of the batch, then gather."""
    device = images.device.type
    outputs = {}
    enabled = torch.is_autocast_enabled(device) if hand_over else False

    def work(number, part):
        with torch.amp.autocast(device, enabled=enabled):  # no dtype, as in nn.DataParallel
            outputs[number] = model(part).float()

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(images.chunk(2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat([outputs[number] for number in sorted(outputs)])


def seen_dtypes(device, asked, inside, forward):
    model = Net(device, asked if inside else None)
    images = torch.ones(8, 32, device=device)
    with torch.amp.autocast(device, dtype=asked, enabled=not inside):
        forward(model, images)
    return sorted(set(model.seen))


def gradient(device, dtype, forward):
    """One scaled backward through the threads; autocast within forward, the loss in float32."""
    model = Net(device, dtype)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(24) % 6
    loss = functional.cross_entropy(forward(model, images.to(device)).float(), labels.to(device))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return model.first.weight.grad


def main(device):
    default = torch.get_autocast_dtype(device)
    other = torch.float16 if default == torch.bfloat16 else torch.bfloat16
    name = str(other)[6:]
    print(f"1. {name} is asked for; what a hidden layer sees in two threads ({device})")
    naked = seen_dtypes(device, other, False, threaded)
    handed = seen_dtypes(device, other, False, lambda *parts: threaded(*parts, hand_over=True))
    inside = seen_dtypes(device, other, True, threaded)
    print(f"  autocast around the model, plain threads           {naked}")
    print(f"  autocast around, only 'on' handed to the threads   {handed}")
    print(f"  autocast inside forward, with its dtype            {inside}")
    assert naked == ["float32"] and handed == [str(default)[6:]] != [name] and inside == [name], (
        "autocast reached plain threads, or handing it over brought its dtype, or autocast inside forward did not"
    )

    print("2. The gradient through two threads, against one thread")
    for dtype in (torch.float16, torch.bfloat16):
        one = gradient(device, dtype, lambda model, part: model(part))
        two = gradient(device, dtype, threaded)
        error = ((one - two).norm() / one.norm()).item()
        print(f"  {str(dtype)[6:]:<9} norm {two.norm().item():.4f}, difference {error:.2%}")
        assert error < 0.02, "two threads do not give the gradient of one"

    if device == "cuda":
        count = torch.cuda.device_count()
        seen = seen_dtypes(device, other, True, lambda model, part: nn.DataParallel(model)(part))
        print(f"3. nn.DataParallel itself, {count} GPU(s), autocast inside forward: {seen}")
        assert seen == [name], "autocast inside forward did not reach nn.DataParallel's threads"
    print("RULE: with DataParallel, autocast and its dtype belong inside forward.")
    return f"{naked[0]}: autocast belongs to the thread that entered it"


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
