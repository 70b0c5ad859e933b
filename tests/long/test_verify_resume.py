"""benchmarks/verify_resume.py stops and resumes real trainings and says whether the runs are equal."""

import subprocess
import sys

import tiny

SCRIPT = tiny.ROOT / "benchmarks" / "verify_resume.py"


def verify(data, *more):
    words = tiny.words(data, "unused", "--model=shufflenet_v2_x0_5", "--cache=none", *more)[1:]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=400, env=tiny.environment()
    )
    return done.returncode, done.stdout + done.stderr


def test_stops_and_resumes_of_real_trainings_come_to_the_same_end(data):
    status, said = verify(data, "--stops=1", "--epochs=9")
    assert status == 0, said
    assert "resume verified" in said and "bit for bit" in said


def test_a_training_that_ends_before_it_is_stopped_proves_nothing(data):
    status, said = verify(data, "--stops=2", "--epochs=1", "--batch_size=24")
    assert status == 1, said
    assert "--epochs" in said


def test_runs_that_differ_are_told_apart():
    sys.path.insert(0, str(SCRIPT.parent))
    from verify_resume import differences

    same = {"last.pt/epoch": "1", "last.pt/loss": "0.5"}
    assert differences(same, dict(same)) == []
    assert differences(same, same | {"last.pt/loss": "0.25"}) == ["last.pt/loss"]
    assert differences(same, same | {"metrics/0": "1"}) == ["metrics/0"]
    assert differences(same, {"last.pt/epoch": "1"}) == ["last.pt/loss"]
