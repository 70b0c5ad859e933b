"""benchmarks/verify_resume.py stops and resumes real trainings, here forks, and says whether the runs are equal."""

import sys

import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))

import verify_resume


@pytest.fixture
def verify(data, monkeypatch, capsys):
    """Run the script with options of a training; return what it printed."""
    monkeypatch.setattr(verify_resume, "subprocess", tiny.Subprocess)

    def run(*more):
        words = tiny.words(data, "unused", "--cache=none", *more)[1:]
        monkeypatch.setattr(sys, "argv", ["verify_resume.py", *words])
        verify_resume.main()
        return capsys.readouterr().out

    return run


def test_stops_and_resumes_of_real_trainings_come_to_the_same_end(verify):
    said = verify("--stops=2", "--epochs=9")
    assert "resume verified (2 stops)" in said and "bit for bit" in said


def test_a_training_that_ends_before_it_is_stopped_proves_nothing(verify):
    with pytest.raises(SystemExit, match="--epochs"):
        verify("--stops=2", "--epochs=1", "--batch_size=24")


def test_runs_that_differ_are_told_apart():
    same = {"last.pt/epoch": "1", "last.pt/loss": "0.5"}
    assert verify_resume.differences(same, dict(same)) == []
    assert verify_resume.differences(same, same | {"last.pt/loss": "0.25"}) == ["last.pt/loss"]
    assert verify_resume.differences(same, same | {"metrics/0": "1"}) == ["metrics/0"]
    assert verify_resume.differences(same, {"last.pt/epoch": "1"}) == ["last.pt/loss"]
