"""`python main.py inspect`: on a trained run, on a model of the reader's, and its exit statuses.

Run: pytest tests/test_inspection_command.py
"""

import json
import subprocess
import sys

import tiny

SCRIPT = """
import sys
import utils

import torch

print(sys.argv[1:], utils.MINE)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(6):
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_script_is_traced_with_its_own_arguments_and_modules(tmp_path):
    (tmp_path / "utils.py").write_text("MINE = 7\n")
    (tmp_path / "train.py").write_text(SCRIPT)
    words = ["inspect", f"--script={tmp_path / 'train.py'}", f"--out={tmp_path / 'out'}", "--", "--lr", "3", "-x"]
    done = subprocess.run([sys.executable, tiny.ROOT / "main.py", *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("['--lr', '3', '-x'] 7\nUpdate 3 of ") and not done.stderr
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["ok"] is True


def test_a_trained_run_is_inspected(trained, scenes_folder, tmp_path, run):
    folder, *_ = trained["amp-fp16"]
    words = ["inspect", f"--checkpoint_dir={folder.parent}", f"--checkpoint_name={folder.name}", "--batch_size=8"]
    status, out, err = run([*words, f"--data_dir={scenes_folder}", f"--out={tmp_path}", "--precisions=fp32,amp-bf16"])
    assert (status, err) == (0, "")
    content = json.loads((tmp_path / "inspect.json").read_text())
    assert content["scaler"][0]["loss_scale"] == content["underflow"]["scaler_scale"]
    assert (tmp_path / "scaler.png").exists() and "4. Scaler diary" in out and content["ok"] is True
    status, out, err = run(
        [*words, f"--data_dir={scenes_folder}", f"--out={tmp_path}", "--layers", "--precisions=amp-bf16"]
    )
    assert (status, err) == (0, "") and "Error by layer" in out and (tmp_path / "layers.png").exists()
