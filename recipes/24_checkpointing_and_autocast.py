"""Recipe 24: activation checkpointing and autocast.

Rule: the second forward pass of a checkpointed block must take the same casts as the first.
Why: checkpoint() keeps a block's input alone and computes its activations again during the backward pass. It
restores the autocast region that stood around the call and the random numbers, but not the variables that a block
reads to choose its precision, nor autocast's cache of cast weights.
When it is broken: CheckpointError, "Recomputed values for the following tensors have different metadata", if a flag
changed between the passes. With selective checkpointing, "_to_copy ... not found in storage", if two blocks share a
weight: the second one found its cast in the cache, and casts it itself when it is computed again.
"""

import argparse
import sys
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

QUESTION = """A network of eight blocks runs under autocast with bfloat16. Its blocks are checkpointed. How much less
do the activations take that wait for the backward pass: a half, a quarter, an eighth?"""
BLOCKS = 8
WIDTH = 256


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, inputs):
        return inputs + self.layers(inputs)


class Chooses(Block):
    """A block that chooses its precision itself, by a flag that others may change."""

    amp = True

    def forward(self, inputs):
        with torch.amp.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return super().forward(inputs)


def train(device, *, checkpointed, dtype=torch.bfloat16):
    """Return the loss, the gradients and the bytes that wait for the backward pass, the float32 weights left out."""
    torch.manual_seed(0)
    model = nn.ModuleList(Block() for _ in range(BLOCKS)).to(device)
    hidden = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    kept = {}

    def keep(tensor):  # called for each tensor that autograd saves, but for those inside checkpoint()
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32),
    ):
        for block in model:
            if checkpointed:
                keep(hidden)  # the block's input is what checkpoint() holds
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        loss = hidden.square().mean()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held = [storage.nbytes() for address, storage in kept.items() if address not in weights]
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()], sum(held)


def flag_changes(device, *, enter_outside):
    """Return the error of a backward pass before which the flag of the block was changed."""
    torch.manual_seed(0)
    block = (Block() if enter_outside else Chooses()).to(device)
    inputs = torch.randn(4, WIDTH, device=device, requires_grad=True)
    with torch.amp.autocast(device, dtype=torch.bfloat16, enabled=enter_outside):
        outputs = checkpoint(block, inputs, use_reentrant=False)
    Chooses.amp = False  # validation in float32 begins before the backward pass is done, for instance
    try:
        outputs.float().sum().backward()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        Chooses.amp = True
    return None


def keep_products(_context, operator, *_arguments, **_options):
    """Decide for selective checkpointing: keep the results of matrix products and casts, compute the rest again."""
    kept = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._to_copy.default)
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


def shared_weight(device, *, cache):
    """Return the error of two selectively checkpointed blocks that share one linear layer."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH).to(device)
    hidden = torch.randn(4, WIDTH, device=device, requires_grad=True)
    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    with torch.amp.autocast(device, dtype=torch.bfloat16, cache_enabled=cache):
        for _ in range(2):
            hidden = checkpoint(lambda x: layer(x).relu(), hidden, use_reentrant=False, context_fn=contexts)
    try:
        hidden.float().sum().backward()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def main(device):
    print(f"1. What waits for the backward pass, {BLOCKS} blocks ({device})")
    held = {}
    for name, options in {
        "float32": {"checkpointed": False, "dtype": torch.float32},
        "bfloat16": {"checkpointed": False},
        "bfloat16, checkpointed": {"checkpointed": True},
    }.items():
        loss, gradients, held[name] = train(device, **options)
        print(f"  {name:<23}loss {loss:.4f}, {held[name] / 2**20:5.1f} MiB")
        if name == "bfloat16":
            plain = (loss, gradients)
    same = loss == plain[0] and all(map(torch.equal, gradients, plain[1]))
    print(f"  loss and gradients as without checkpointing, bit for bit: {same}")
    assert same, "checkpointing under autocast changed the loss or a gradient"
    share = held["bfloat16, checkpointed"] / held["bfloat16"]
    assert share < 0.2 and held["bfloat16"] < 0.8 * held["float32"], "the activations did not shrink"

    print("2. Broken: the block reads a flag, which changes before backward()")
    error = flag_changes(device, enter_outside=False)
    print(f"  {(error or 'no error')[:76]}")
    assert error and "different metadata" in error, "the changed flag was not noticed"
    print("   Cured: autocast stands around checkpoint(), which restores it")
    assert flag_changes(device, enter_outside=True) is None, "autocast around checkpoint() was not restored"
    print("  no error")

    print("3. Broken: selective checkpointing of two blocks that share a weight")
    error = shared_weight(device, cache=True)
    print(f"  {(error or 'no error: this version of PyTorch copes')[:76]}")
    assert error is None or "_to_copy" in error, "another error than that of the missing cast"
    print("   Cured: cache_enabled=False")
    assert shared_weight(device, cache=False) is None, "without the cache the casts still differ"
    print("  no error")
    print("RULE: autocast around checkpoint(); change nothing it reads until backward().")
    return f"to {share:.0%}: the input of each block stays, its four times wider inside does not"


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
