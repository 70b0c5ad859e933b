"""A comparison whose runs fail, were not replaced, or are only begun; its estimate of the time for all of them."""

import json

import tiny
from test_main import comparison, words

from command_line import parsing
from commands import compare

__all__ = ["comparison"]  # a fixture


def test_runs_that_were_not_replaced_are_not_shown_as_new(comparison, run, monkeypatch):
    folder, given, _ = comparison
    monkeypatch.setattr(compare, "_process", lambda given, _: 2)
    status, out, err = run([*given, "--overwrite"])
    assert status == 1 and "fp32 (exit status 2)" in err and "Accuracy" not in out
    assert not (folder / "fp32" / "failure.json").exists()

    def fails_at_its_pictures(given, _):
        for name in ("fp32", "amp-bf16"):
            (folder / name / "result.json").touch()  # new numbers, whatever came after them
        return 1

    monkeypatch.setattr(compare, "_process", fails_at_its_pictures)
    status, out, err = run([*given, "--overwrite"])
    assert status == 0 and "Accuracy" in out and "not replaced" not in err, err
    for name in ("fp32", "amp-bf16"):
        (folder / name / "failure.json").unlink(missing_ok=True)
    monkeypatch.setattr(compare, "_process", lambda given, _: 130)
    status, _, err = run([*given, "--overwrite"])
    assert status == 130 and "without --overwrite" in err


def test_wrong_data_fails_a_comparison_at_once_or_with_its_reason(tmp_path, run, monkeypatch):
    monkeypatch.setattr(compare, "subprocess", tiny.Subprocess)
    (tmp_path / "own" / "fp32").mkdir(parents=True)
    (tmp_path / "own" / "fp32" / "failure.json").write_text('{"precision": "fp32", "reason": "an old one"}')
    status, out, err = run(["compare", *words(tmp_path / "nowhere", tmp_path, "own"), "--precisions=fp32"])
    assert status == 2 and "Three ways to get data" in err and "run 1" not in out
    tiny.images(tiny.draw(tmp_path / "data"))[0].write_bytes(b"no image")
    status, out, _ = run(["compare", *words(tmp_path / "data", tmp_path, "own"), "--precisions=fp32"])
    assert status == 1 and "cannot be read" in out and "an old one" not in out


def test_other_options_are_refused_before_anything_is_trained(comparison, tmp_path, run, monkeypatch):
    folder, given, _ = comparison
    started = []
    monkeypatch.setattr(compare, "_process", lambda given, _: started.append(given) or 1)
    status, _, err = run([*given[:-1], "--precisions=amp-fp16,fp32", f"--data_dir={tmp_path}"])
    assert status == 2 and not started and "--data_dir" in err and "--overwrite" in err


def test_compare_estimates_the_time_for_all_runs(scenes_folder, tmp_path, run, monkeypatch):
    def process(given, _):
        folder = tmp_path / "timed" / given[-2].removeprefix("--checkpoint_name=")
        folder.mkdir(parents=True, exist_ok=True)
        config = {"precision": "fp32", "options": {"seed": parsing.parse(given).seed}}
        (folder / "config.json").write_text(json.dumps(config))
        return 0

    monkeypatch.setattr(compare, "_process", process)
    command = ["compare", *words(scenes_folder, tmp_path, "timed"), "--precisions=fp32"]
    run(command)
    status, out, err = run([*command, "--seeds=2"])
    assert {path.name for path in (tmp_path / "timed").iterdir() if path.is_dir()} == {"fp32", "fp32-seed43"}
    assert out.count("run 2 of 2: fp32-seed43, about 0 s left for all runs\n") == out.count(" left ") == 1
    assert status == 1 and "no run of the comparison finished" in err and "(seed 43): not finished" in out
