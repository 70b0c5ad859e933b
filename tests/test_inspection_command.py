"""`python main.py inspect`: on a trained run, on a model of the reader's, and its exit statuses.

Run: pytest tests/test_inspection_command.py
"""

import json

from whole_step import LOSS, written


def test_a_module_on_the_command_line(tmp_path, run):
    status, out, err = run(["inspect", f"--module={written(tmp_path, LOSS)}", f"--out={tmp_path / 'out'}", "--strict"])
    assert (status, err) == (0, "") and "no rule is broken" in out
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["ok"] is True


def test_a_mistake_is_status_2(tmp_path, run):
    status, out, err = run(["inspect", f"--module={tmp_path / 'none.py'}:make"])
    assert status == 2 and "there is no such file" in err and not out


def test_a_trained_run_is_inspected(trained, scenes_folder, tmp_path, run):
    folder, *_ = trained["amp-fp16"]
    words = ["inspect", f"--checkpoint_dir={folder.parent}", f"--checkpoint_name={folder.name}", "--batch_size=8"]
    status, out, err = run([*words, f"--data_dir={scenes_folder}", f"--out={tmp_path}", "--precisions=fp32,amp-bf16"])
    assert (status, err) == (0, "")
    content = json.loads((tmp_path / "inspect.json").read_text())
    assert content["scaler"][0]["loss_scale"] == content["underflow"]["scaler_scale"]
    assert (tmp_path / "scaler.png").exists() and "4. Scaler diary" in out and content["ok"] is True
