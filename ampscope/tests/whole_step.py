"""What several tests of the library inspect: a whole step in float16 as PyTorch's documentation writes it, a file."""

import inspect
import textwrap
from pathlib import Path

import torch
from torch import nn

from ampscope.inspecting import Inspection
from ampscope.places import count_as_users
from ampscope.subject import Subject

CPU_BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}
CPU_FP16 = {"device_type": "cpu", "dtype": torch.float16}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 32, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def loss_of(outputs, batch):
    return nn.functional.cross_entropy(outputs, batch[1])


class Whole:
    """A whole training step in float16 with a scaler, as PyTorch's documentation writes it; subclasses spoil it."""

    autocast = CPU_FP16
    init_scale = 2.0**8
    scaled = True

    def __init__(self):
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale, enabled=self.scaled)

    def step(self, model, batch):
        self.optimizer.zero_grad()
        with torch.autocast(**self.autocast):
            loss = loss_of(model(batch[0]), batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def line_of(planted):
    """Return (file, line) of the comment `# here` in a class or function."""
    lines, start = inspect.getsourcelines(planted)
    (line,) = [number for number, text in enumerate(lines, start) if text.rstrip().endswith("# here")]
    return Path(inspect.getsourcefile(planted)), line


def findings(model, step):
    """Return what the step as it is written breaks."""
    count_as_users(step)
    inspection = Inspection(Subject(model, batch(), step=step), ["fp32"], [], None)
    inspection.trace_as_written()
    return inspection.everything


LOSS = """
import torch
from torch import nn

def make():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    batch = torch.randn(8, 16), torch.randint(0, 8, (8,))
    return model, batch, lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1])
"""


def written(folder, text, name="mine.py"):
    file = folder / name
    file.write_text(textwrap.dedent(text))
    return f"{file}:make"
