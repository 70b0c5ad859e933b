"""`--batch_size auto` on real networks: what is said to fit takes no more than is free in a process like a run's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
sys.path[:0] = [ROOT]
import utils
utils.keep_freed_memory()
import torch
from assemble import adapt_to_cpu
from model import build_model
from precision import Precision
from runs import fitting
from system.machine import linux_memory, reset_peak_memory

name, size, precision, free, freed = ARGUMENTS
cpu = torch.device("cpu")
torch.set_num_threads(1)
regime = Precision(precision, cpu, "a test")
model = adapt_to_cpu(build_model(name, 5, pretrained=False, image_size=size), amp=regime.amp)
model = model.to(memory_format=torch.channels_last).train()
fitting.available_memory = lambda: free
held = [torch.ones(2**16) for _ in range(4 * freed)]
del held
resident = linux_memory("/proc/self/status", "VmRSS")
fits = fitting.micro_batch_that_fits(model, size, 4096, regime, cpu)
handed_back = resident - linux_memory("/proc/self/status", "VmRSS")

before = linux_memory("/proc/self/status", "VmRSS")
reset_peak_memory(cpu)
optimizer = torch.optim.Adam(model.parameters(), fused=True)
for _ in range(2):
    images = torch.rand(fits, 3, size, size).contiguous(memory_format=torch.channels_last)
    with regime.autocast():
        loss = torch.nn.functional.cross_entropy(model(images), torch.zeros(fits, dtype=torch.long))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
taken = linux_memory("/proc/self/status", "VmHWM") - before
print(json.dumps([fits, handed_back, taken]))
"""


def tried(name: str, size: int, precision: str, free: int, freed: int) -> tuple[int, int, int]:
    """Return the number of images that fit, and in bytes the memory returned to the system and used by two updates."""
    arguments = (name, size, precision, free, freed)
    program = PROGRAM.replace("ROOT", repr(str(ROOT))).replace("ARGUMENTS", repr(arguments))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system counts no peak memory anew")
@pytest.mark.parametrize(
    ("name", "size", "precision", "free"), [("resnet18", 64, "amp-bf16", 400), ("squeezenet1_1", 64, "fp32", 200)]
)
def test_what_fits_takes_no_more_than_is_free_and_no_less_than_a_quarter(name, size, precision, free):
    fits, _, taken = tried(name, size, precision, free * 2**20, 0)
    assert free / 4 < taken / 2**20 < free, fits


def test_what_was_freed_before_is_handed_back_and_changes_nothing():
    """After 300 MB were freed 512 images seemed to fit where 128 do."""
    fits, _, _ = tried("squeezenet1_1", 64, "fp32", 2**27, 0)
    again, handed_back, _ = tried("squeezenet1_1", 64, "fp32", 2**27, 300)
    assert again == fits and handed_back > 200 * 2**20
