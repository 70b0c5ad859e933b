"""What users type and write by hand: paths with variables and a home, and configs saved by any editor.

In this process. Run it alone: pytest tests/long/test_typed.py
"""

import json
import shutil

import pytest
import tiny

import main


def test_home_and_variables_in_every_path(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(data))
    odd = "odd $name, ünï"
    words = tiny.words("$DATA", "~/runs", "--epochs=1", name=odd)
    assert main.main(words) == 0
    run = tmp_path / "runs" / odd
    assert (run / "result.json").exists()
    config = tiny.config(run)
    config["options"] |= {"data_dir": "${DATA}", "epochs": 1}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    assert main.main(["--config=~/mine.json", "--checkpoint_dir=~/runs", "--checkpoint_name=again"]) == 0
    assert (tmp_path / "runs" / "again" / "result.json").exists()
    named = ["--checkpoint_dir=~/runs", "--checkpoint_name=again"]
    assert main.main(["predict", *named, "$DATA/seg_test", "--csv=~/p.csv", "--contact_sheet=$HOME/s.png"]) == 0
    assert (tmp_path / "p.csv").exists() and (tmp_path / "s.png").exists()


def test_a_path_that_exists_under_just_this_name_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("x", "elsewhere")
    tiny.draw(tmp_path / "$x")
    assert main.main(["prepare", "--check", "--data_dir=$x"]) == 0


@pytest.mark.parametrize("option", ["--data_dir=", "--checkpoint_dir= ", "--config="])
def test_an_empty_path_is_a_mistake(option, capsys):
    assert main.main(["train", option]) == 2
    assert "is empty" in capsys.readouterr().err


SAVED = {
    "a mark in front": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "returns": lambda text: text.replace("\n", "\r\n").encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "Windows-1252": lambda text: text.encode("cp1252"),
}


@pytest.mark.parametrize("how", SAVED)
def test_a_config_saved_by_any_editor(how, data, tmp_path, capsys):
    folder = tmp_path / "Bilder für später"
    shutil.copytree(data, folder)
    text = json.dumps({"options": {"data_dir": str(folder), "epochs": 1}}, indent=1, ensure_ascii=False)
    (tmp_path / "config.json").write_bytes(SAVED[how](text))
    replaced = ("--data_dir", "--epochs", "--quiet")
    words = [word for word in tiny.words(data, tmp_path) if not word.startswith(replaced)]
    assert main.main([*words, f"--config={tmp_path / 'config.json'}"]) == 0
    assert ("read as Windows-1252" in capsys.readouterr().out) == (how == "Windows-1252")
    assert tiny.config(tmp_path / "run")["options"]["data_dir"] == str(folder)


@pytest.mark.parametrize(
    "text, named",
    [
        ('{"options": {\n  "epochs": 3,\n}}', "line 3"),
        ('{"options": {\n  “epochs”: 3}}', "line 2"),
        ('{"options": {"data_dir": "C:\\data"}}', "line 1"),
    ],
    ids=["a comma too many", "curly quotes", "backslashes"],
)
def test_a_config_with_a_slip_names_its_line(text, named, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert main.main(["train", f"--config={tmp_path / 'config.json'}"]) == 2
    said = capsys.readouterr().err
    assert named in said and "straight double quotes" in said
