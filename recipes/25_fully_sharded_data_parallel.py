"""Recipe 25: FSDP2, whose own policy of precisions is not autocast.

Rule: take autocast or fully_shard's MixedPrecisionPolicy, not both; float16 needs torch.amp.GradScaler with either.
Why: autocast chooses operator by operator and keeps powers, sums and losses in float32. The policy casts the weights
and inputs of a whole module, and everything inside it runs in 16 bits. In exchange the weights travel in 16 bits,
half as many bytes. The gradients come back as float32 shards in both.
When it is broken: a loss inside the module overflows, which autocast would have kept in float32. And
whoever checks the gradients for inf by hand sees one shard of them: a rank steps while another one skips.
"""

import argparse
import os
import sys
import tempfile

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional

QUESTION = """Two processes share a model by FSDP2 in float16. The gradient of one weight overflows. Each process looks
at the gradients that it holds. How many of the two see an inf?"""
WORLD = 2


class Net(nn.Module):
    """An autoencoder that returns its own loss, whose squares overflow float16 for errors above 256."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(32, 64)
        self.decoder = nn.Linear(64, 32)
        self.seen = {}

    def forward(self, inputs):
        decoded = self.decoder(self.encoder(inputs).relu())
        loss = functional.mse_loss(decoded, inputs)
        self.seen = {"linear": decoded.dtype, "loss": loss.dtype}
        return loss


def make(device, policy):
    torch.manual_seed(0)
    model = Net().to(device)
    mesh = init_device_mesh(device, (WORLD,))
    fully_shard(model, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(rank, device, dtype, *, by_policy, size=1.0, loud=False):
    """One update. Return what this rank saw of types, loss, its shards of the gradients, and of the scale."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    model, optimizer = make(device, policy if by_policy else None)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=dtype == torch.float16)
    images = size * torch.randn(24, 32, generator=torch.Generator().manual_seed(rank)).to(device)
    with torch.amp.autocast(device, dtype=dtype, enabled=not by_policy):
        loss = model(images)
    scaler.scale(loss).backward()
    if loud:
        bias = model.decoder.bias.grad.to_local()  # 32 numbers: rank 0 holds the first 16
        bias[:1] = torch.inf if rank == 0 else bias[:1]
    scaler.unscale_(optimizer)
    shards = [parameter.grad.to_local() for parameter in model.parameters()]
    saw = any(not bool(shard.isfinite().all()) for shard in shards)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    after = [parameter.to_local() for parameter in model.parameters()]
    return {
        "types": {name: str(kind)[6:] for name, kind in model.seen.items()},
        "gradient": str(shards[0].dtype)[6:],
        "elements": sum(shard.numel() for shard in shards),
        "loss": loss.item(),
        "saw inf": saw,
        "moved": not all(map(torch.equal, before, after)),
        "scale": scaler.get_scale() if scaler.is_enabled() else None,
    }


CASES = {
    "autocast bfloat16": {"dtype": torch.bfloat16, "by_policy": False},
    "policy bfloat16": {"dtype": torch.bfloat16, "by_policy": True},
    "autocast float16": {"dtype": torch.float16, "by_policy": False, "size": 1000.0},
    "policy float16": {"dtype": torch.float16, "by_policy": True, "size": 1000.0},
    "loud": {"dtype": torch.float16, "by_policy": True, "loud": True},
}


def work(rank, device, init_file, results):
    distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=WORLD)
    if device == "cuda":  # with a GPU for each, take nccl
        torch.cuda.set_device(rank % torch.cuda.device_count())
    for name, options in CASES.items():
        results.put((name, rank, train(rank, device, **options)))
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads outlive the group


def main(device):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(work, (device, f"{folder}/init", results), nprocs=WORLD, start_method="spawn")
    saw = {name: [None] * WORLD for name in CASES}
    while not results.empty():
        name, rank, found = results.get()
        saw[name][rank] = found

    whole = sum(parameter.numel() for parameter in Net().parameters())
    held = [found["elements"] for found in saw["policy bfloat16"]]
    print(f"1. {WORLD} processes hold {held[0]} and {held[1]} of {whole} gradients ({device})")
    print("   What runs in which type:  linear    loss      gradient of the weights")
    for name in ("autocast bfloat16", "policy bfloat16"):
        found = saw[name][0]
        print(f"  {name:<26}{found['types']['linear']:<10}{found['types']['loss']:<10}{found['gradient']}")
    assert sum(held) == whole, "the shards are not the whole"
    assert [saw[name][0]["types"]["loss"] for name in ("autocast bfloat16", "policy bfloat16")] == [
        "float32",
        "bfloat16",
    ], "autocast did not keep the loss in float32, or the policy did"
    assert {found["gradient"] for found in (saw["autocast bfloat16"][0], saw["policy bfloat16"][0])} == {"float32"}, (
        "a gradient did not arrive in float32"
    )

    print("2. Broken: inputs a thousand times larger, in float16")
    for name in ("autocast float16", "policy float16"):
        found = saw[name][0]
        print(f"  {name:<18}loss {found['loss']:.1f}")
    right, wrong = (saw[name][0]["loss"] for name in ("autocast float16", "policy float16"))
    assert right == right < 1e7 and wrong == float("inf"), "the policy's loss did not overflow, or autocast's did"

    print("3. Which scaler: one gradient is inf, and only rank 0 holds it")
    for rank, found in enumerate(saw["loud"]):
        cells = f"{found['saw inf']!s:<6} moved: {found['moved']!s:<6} scale {found['scale']:.0f}"
        print(f"  rank {rank} sees an inf: {cells}")
    assert [found["saw inf"] for found in saw["loud"]] == [True, False], "the inf is not on rank 0 alone"
    assert not any(found["moved"] for found in saw["loud"]), "a rank took a step"
    assert {found["scale"] for found in saw["loud"]} == {512.0}, "the ranks' scales differ"
    print("   torch.amp.GradScaler asks all ranks; FSDP1's ShardedGradScaler is not needed.")
    print("RULE: autocast or the policy, not both; float16 needs GradScaler with either.")
    return f"{sum(found['saw inf'] for found in saw['loud'])}: each holds a shard, so the scaler must ask both"


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
