"""`python main.py inspect` on a trained run.

Run: pytest tests/test_inspection_command.py
"""

import json


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
