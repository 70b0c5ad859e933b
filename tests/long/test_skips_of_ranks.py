"""Two processes, of which one overflows in its forward pass: both skip, and both put their buffers back."""

import tiny
import torch
from torch import nn

from model import StepModel
from optimizer import make_optimizer
from precision import Precision
from train import update_weights

FP16 = Precision("amp-fp16", torch.device("cpu"), "a test")


def two_updates(rank: int, folder: str) -> None:
    """Save the buffers before and after an update with too bright images on rank 1, and the weights."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = tiny.Classifier(3)
    optimizer = make_optimizer(model.parameters(), "ADAM", learning_rate=1e-2, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    forward = StepModel(nn.parallel.DistributedDataParallel(model), set(), False)
    states = []
    for bright in (False, True):
        images = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(rank))
        images = images * 1e6 if bright and rank == 1 else images
        update_weights(
            forward,
            [(images, torch.arange(6) % 3, 1, True)],
            12,
            optimizer=optimizer,
            scaler=scaler,
            precision=FP16,
            criterion=nn.CrossEntropyLoss(reduction="sum"),
            clip_grad_norm=None,
            ranks=2,
        )
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    torch.save({"states": states, "scale": scaler.get_scale()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_put_their_buffers_back_alike(tmp_path):
    torch.multiprocessing.spawn(two_updates, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [rank["scale"] for rank in found] == [8.0, 8.0]
    for rank in found:
        before, after = rank["states"]
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(value.isfinite().all() for value in after.values())
    weights = [dict(rank["states"][1]) for rank in found]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if "running" not in name)
