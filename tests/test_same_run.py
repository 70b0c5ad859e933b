"""A run is the same run, bit for bit, wherever it is stopped and however its images come."""

import pytest
import tiny

tiny.register_classifier()
pytestmark = pytest.mark.usefixtures("undrawn")


def trained(data, runs, *more):
    """The outcome of a run of two epochs of three updates, the last of each ragged."""
    assert tiny.train(data, runs, "--model=tiny_classifier", *more) == 0
    return tiny.outcome(runs / "run")


def stopped_after_each_update(data, runs, *more):
    """The outcome of the same run, stopped by a signal after each of its updates, then resumed."""
    for update in range(6):
        with pytest.MonkeyPatch.context() as patch:
            tiny.stop_after(patch, 1)
            resumed = ["--resume"] if update else []
            assert tiny.train(data, runs, "--model=tiny_classifier", *more, *resumed) == 130
    return trained(data, runs, *more, "--resume")


def test_a_run_stopped_after_any_update_is_the_same_run(data, tmp_path):
    tiny.assert_equal(trained(data, tmp_path / "a"), stopped_after_each_update(data, tmp_path / "b"))
