"""A run of any options is the same run, stopped after each of its updates and streamed.

SAME_RUNS=100 pytest tests/long/test_any_run.py tries 100 draws instead of 4.
"""

import os
from random import Random

import pytest
import tiny
from test_same_run import BF16, FP16, FP32, SOURCES, stopped_everywhere, stores, straight, undisturbed

__all__ = ["stores", "undisturbed"]  # fixtures


def drawn(random):
    """Options of a training, each drawn by itself."""
    steps = ["crop", "trivial", "randaugment", "augmix", "jitter", "erasing", "upright"]
    return {
        "precision": random.choice([FP32, BF16, FP16]),
        "optimizer": random.choice(["ADAM", "ADAMW", "SGD"]),
        "decay_type": random.choice(["cosine_warmup", "step", "step_warmup", "linear_warmup"]),
        "freeze_epochs": random.choice([0, 1, 2]),
        "accumulate": random.choice([1, 2]),
        "augment": ",".join(random.sample(steps, random.randint(0, 4))) or "none",
        "sampler": random.choice(["shuffle", "balanced"]),
        "mixup": random.choice([0.0, 0.4]),
        "cutmix": random.choice([0.0, 1.0]),
        "start_size": random.choice([0, 11]),
    }


@pytest.mark.parametrize("seed", range(int(os.environ.get("SAME_RUNS", "4"))))
def test_a_run_of_any_options_is_the_same_stopped_anywhere_and_streamed(seed, stores, tmp_path):
    random = Random(seed)
    options = drawn(random)
    source = random.choice(list(SOURCES))
    one = straight(tmp_path / "a", stores["cached"], **options)
    tiny.assert_equal(one, stopped_everywhere(tmp_path / "b", stores[source], **options))
