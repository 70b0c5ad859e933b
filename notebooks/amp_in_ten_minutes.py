# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Mixed precision in ten minutes
#
# You will train a small network in FP32 and with automatic mixed precision (AMP), see what AMP gained on this machine,
# read the update line by line, break two rules and see what happens, and inspect a model of your own.
#
# It runs on a free T4 GPU (in Colab: Runtime, Change runtime type, T4 GPU) and on a CPU alike. This differs:
#
# | | T4 GPU | CPU |
# |---|---|---|
# | 16-bit type of `--amp` | float16, with a GradScaler | bfloat16, without one |
# | bfloat16, TF32 | the hardware has neither | bfloat16 on recent CPUs; TF32 never |
# | what AMP gains | Tensor Cores; half of the activations' memory | depends on the CPU: `doctor` measures it |

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/@REPOSITORY@/blob/main/notebooks/amp_in_ten_minutes.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/@REPOSITORY@/blob/main/notebooks/amp_in_ten_minutes.ipynb)
#
# In Colab and Kaggle the next cell clones https://github.com/@REPOSITORY@. In Kaggle, switch Internet on first, in the
# settings at the right.

# %%
import os
from pathlib import Path

if not Path("main.py").exists() and not Path("../main.py").exists():
    # !git clone --quiet https://github.com/@REPOSITORY@ amp-train
    os.chdir("amp-train")

# %% [markdown]
# ## 1. Get the code
#
# This notebook works from the folder that it lies in: the folder `notebooks` of a checkout.

# %%
import os
import sys
from pathlib import Path

if not Path("main.py").exists():
    os.chdir("..")
sys.path.insert(0, os.getcwd())
quick = bool(os.environ.get("AMP_NOTEBOOK_QUICK"))  # a short run, for the test of this notebook

# %%
# %pip install --quiet --disable-pip-version-check -r requirements.txt

# %%
import torch

torch_sees_a_gpu = torch.cuda.is_available()
print(torch.cuda.get_device_name() if torch_sees_a_gpu else "no GPU: everything runs on the CPU")

# %% [markdown]
# ## 2. What can this machine do?
#
# First guess: which 16-bit type will `--amp` use here, and how many times as fast will an update be? Then let `doctor`
# measure. It times the training update in each precision and says why.

# %%
size = "--image_size 32 --batch_size 4" if quick else ""
# !{sys.executable} main.py doctor {size}

# %% [markdown]
# ## 3. FP32 against AMP
#
# `compare --demo` draws a data set of six kinds of scenes, trains once in each precision, each in a fresh process, and
# ends with the table.

# %%
data = "--demo"
if quick:
    data = "--data_dir data/quick --pretrained 0 --epochs 1 --image_size 16 --model shufflenet_v2_x0_5"
# !{sys.executable} main.py compare {data} --checkpoint_name notebook --quiet

# %%
from IPython.display import Image, display

display(Image("checkpoint/notebook/comparison.png"))

# %% [markdown]
# On a fast GPU a small demo may not show much, because the GPU waits for Python. `doctor` above uses a larger batch.
#
# ## 4. The ladder
#
# Each rung adds one step to the loop of 2020: channels-last, TF32 or its like, AMP, a fused optimizer and so on. The
# mark beside each bar is its bound, from what this machine was measured to multiply and to copy. This takes some
# minutes.

# %%
if not quick:
    size = "" if torch_sees_a_gpu else "--image_size 128 --batch_size 16"
    # !{sys.executable} main.py compare --ladder --checkpoint_name ladder {size}
    display(Image("checkpoint/ladder/ladder.png"))

# %% [markdown]
# ## 5. The update, line by line
#
# This is the loop of 2020, as the first AMP tutorials had it, and beside it the loop of today. Both train; on a CPU the
# old one falls back to float32, with warnings.

# %%
import warnings

from torch import nn
from torch.nn import functional

device = "cuda" if torch_sees_a_gpu else "cpu"
dtype = torch.float16 if device == "cuda" else torch.bfloat16


def make_parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 6)).to(device)
    images = torch.randn(48, 64, device=device)
    labels = torch.arange(48, device=device) % 6
    return model, images, labels


# %%
def train_2020(updates):
    """Before: two branches, old names, a wait for the device in every update."""
    model, images, labels = make_parts()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.cuda.amp.GradScaler()
    amp = True
    losses = []
    for _ in range(updates):
        optimizer.zero_grad()
        if amp:
            with torch.cuda.amp.autocast():
                loss = functional.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return losses


# %%
def train_today(updates, amp=True):
    """After: one path, in which FP32 is autocast and scaler switched off."""
    model, images, labels = make_parts()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=amp and dtype == torch.float16)
    losses = []
    for _ in range(updates):
        with torch.amp.autocast(device, dtype=dtype, enabled=amp):  # forward and loss only
            loss = functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()  # so that small float16 gradients do not become zero
        scaler.unscale_(optimizer)  # from here on .grad is true
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)  # skipped if a gradient is not finite
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())  # read once, at the end
    return torch.stack(losses).tolist()


# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    old = train_2020(20)
print(*sorted({f"{warning.category.__name__}: {warning.message}" for warning in caught}), sep="\n")
for name, losses in {"2020": old, "today, AMP": train_today(20), "today, FP32": train_today(20, amp=False)}.items():
    print(f"{name:<12} loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    assert losses[-1] < losses[0] and abs(losses[-1] - old[-1]) < 0.05, "a loop does not learn as the loop of 2020 does"

# %% [markdown]
# | 2020 | today | why |
# |---|---|---|
# | `torch.cuda.amp` | `torch.amp`, with the device's name | one API for every device; the old names warn |
# | `if amp:` and a second copy of the loop | `enabled=` | what is written twice is mended only once |
# | no `unscale_` | `unscale_`, then clip, then `step` | before it, gradients are larger by the scale |
# | `loss.item()` in each update | read now and then | `.item()` makes the CPU wait for the GPU |
# | `zero_grad()` | `zero_grad(set_to_none=True)` | frees the memory of the gradients (today's default) |
#
# The package's own update is the same with micro-batches, several processes and instruments in it:

# %%
import inspect

import train

print(inspect.getsource(train.update_weights))

# %% [markdown]
# ## 6. Break it
#
# Recipe 2 is about clipping. Run it as it is. Its last line is the rule.

# %%
# !{sys.executable} recipes/02_clipping.py --device {device}

# %% [markdown]
# Now take `unscale_` out of its update. Guess first: which numbers change, and does anything raise an error?

# %%
recipe = Path("recipes/02_clipping.py").read_text()
rule = "    if unscale_first:\n        scaler.unscale_(optimizer)\n"
assert rule in recipe, "recipe 2 was changed: take its unscale_ out by hand"
Path("broken_clipping.py").write_text(recipe.replace(rule, ""))
# !{sys.executable} broken_clipping.py --device {device}

# %% [markdown]
# PyTorch raised nothing. The recipe stopped because it checks its own claims, and its last line says which one broke:
# without `unscale_` the norm is off by the scale.
#
# Recipe 10 trains in float16 without a scaler. Run it, then give its loss a weight of 2 instead of 0.002. Guess: do the
# gradients still vanish?

# %%
# !{sys.executable} recipes/10_without_a_scaler.py --device {device}

# %%
recipe = Path("recipes/10_without_a_scaler.py").read_text()
assert "LOSS_WEIGHT = 0.002" in recipe, "recipe 10 was changed: give its loss another weight by hand"
Path("broken_scaler.py").write_text(recipe.replace("LOSS_WEIGHT = 0.002", "LOSS_WEIGHT = 2.0"))
# !{sys.executable} broken_scaler.py --device {device}

# %% [markdown]
# With a loss a thousand times larger nothing vanishes, so the recipe's claim is false, and it stops and says so. A
# weight on the loss *is* a loss scale; GradScaler only chooses it for you, and takes it out again.
#
# ## 7. Inspect a model of your own
#
# `inspect_step` runs one step of any model and says what AMP does to it: which operators run in 16 bits, what memory
# holds, which gradients vanish or overflow, and which rules the code breaks. Put your model and a batch here.

# %%
from ampscope import inspect_step


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16 * 16 * 16, 6)

    def forward(self, images):
        return self.head(self.features(images).flatten(1))


torch.manual_seed(0)
batch = (torch.randn(16, 3, 32, 32, device=device), torch.arange(16, device=device) % 6)
report = inspect_step(
    Mine().to(device), batch, lambda outputs, batch: functional.cross_entropy(outputs, batch[1]), speed=not quick
)
print(report)

# %% [markdown]
# ## Where to go from here
#
# - The [recipes](../recipes/README.md): one rule each, with `--quiz` to guess first; then ten exercises.
# - [Messages and symptoms](../docs/errors.md), if something went wrong in your own code.
# - [The numbers behind mixed precision](../docs/mixed_precision.md): formats, underflow, the scaler's diary; then
#   [memory and speed](../docs/memory_and_speed.md).
# - [Floats to play with](../docs/floats.html): flip bits, move the loss scale. Open it in a browser.
# - Your own pictures: `python main.py --data_dir FOLDER --amp`.
