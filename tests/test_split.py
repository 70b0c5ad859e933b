"""The division into training, validation and test images: shares, classes, groups and copies.

Run: pytest tests/test_split.py
"""

import itertools

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from images.split import divide, extend, hold_out, same_pictures, united
from utils import UserError


def counted(labels, parts, many):
    """Images (class, part)."""
    return np.array([np.bincount(parts[labels == label], minlength=many) for label in np.unique(labels)])


@pytest.mark.parametrize(
    "count, asked, parts",
    [
        (200, (70, 15, 15), (140, 30, 30)),
        (100, (70, 15, 15), (70, 15, 15)),
        (400, (60, 20, 20), (240, 80, 80)),
        (1000, (33, 33, 34), (330, 330, 340)),
        (60, (100 / 3, 100 / 3, 100 / 3), (20, 20, 20)),
        (10, (80, 20), (8, 2)),
        (21, (80, 20), (17, 4)),
    ],
)
def test_whole_shares_are_met_exactly(count, asked, parts):
    for classes, seed in itertools.product((1, 2), (0, 1, 42)):
        labels = np.arange(count) % classes
        assert tuple(np.bincount(divide(labels, seed=seed, shares=asked, with_test=len(asked) == 3))) == parts


@pytest.mark.parametrize(
    "counts, asked", [((5, 23, 60), (80, 20)), ((9, 31, 14, 50), (55, 30, 15)), ((21,), (70, 15, 15))]
)
def test_parts_and_classes_within_them_are_within_one_image_of_their_share(counts, asked):
    """A sample of tests/long/test_shares.py; a fifth of each class is the fifth that scikit-learn draws."""
    for seed in (0, 42):
        labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
        parts = divide(labels, seed=seed, shares=asked, with_test=len(asked) == 3)
        found = counted(labels, parts, len(asked))
        exact = np.array(counts)[:, None] * np.array(asked) / 100
        assert max(np.abs(found - exact).max(), np.abs(found.sum(0) - exact.sum(0)).max()) < 1 + 1e-6
        if len(asked) == 2:
            held = (2 * len(labels) + 5) // 10
            _, drawn = train_test_split(np.arange(len(labels)), test_size=held, stratify=labels, random_state=seed)
            assert np.flatnonzero(divide(labels, seed=seed)).tolist() == sorted(drawn)


@pytest.mark.parametrize("asked", [(40, 30, 30), (50, 10, 40), (20, 20, 60), (70, 15, 15)])
def test_shares_of_many_groups_are_those_asked_for(asked):
    owner = np.random.default_rng(1).permutation(np.repeat(np.arange(600), 5))
    labels = owner % 3
    together = [np.flatnonzero(owner == group).tolist() for group in range(600)]
    parts = divide(labels, seed=1, shares=asked, with_test=True, together=together)
    assert np.abs(np.bincount(parts) / 30 - asked).max() < 0.2
    assert np.abs(counted(labels, parts, 3) / 10 - asked).max() < 0.6
    held = hold_out(labels, asked[2] / 100, 1, united(together, len(labels)))
    assert abs(len(held) / 30 - asked[2]) < 0.2


def test_copies_do_not_shift_the_shares():
    labels = np.arange(200) % 2
    together = [[0, 2, 4, 6], [1, 3], [10, 12]]
    parts = divide(labels, seed=1, with_test=True, together=together)
    assert np.bincount(parts).tolist() == [140, 30, 30]
    assert np.bincount(divide(labels, seed=1, together=together)).tolist() == [160, 40]


@pytest.mark.parametrize("grouped", [False, True])
def test_the_seed_moves_validation_and_never_the_test_images(grouped):
    labels = np.arange(120) % 3
    together = [[place, place + 3] for place in range(0, 120, 6)] if grouped else []
    first, same, other = (divide(labels, seed=seed, with_test=True, together=together) for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert np.array_equal(first == 2, other == 2) and not np.array_equal(first == 1, other == 1)
    neither = [np.corrcoef(np.arange(120), first == part)[0, 1] for part in (1, 2)]
    assert np.abs(neither).max() < 0.3  # drawn from everywhere, not from one end


def test_units_join_what_any_list_joins():
    assert united([[0, 3], [4, 3], [5, 6]], 7).tolist() == [0, 1, 2, 0, 0, 5, 5]


@pytest.mark.parametrize("counts", [[2, 2], [3, 2, 40], [1, 50, 50], [2, 1000], [1, 2, 2, 1, 3]])
@pytest.mark.parametrize("with_test", [False, True])
def test_a_class_of_two_gives_one(counts, with_test):
    labels = np.repeat(np.arange(len(counts)), counts)
    for seed in range(5):
        parts = divide(labels, seed=seed, with_test=with_test)
        for label, count in enumerate(counts):
            inside = parts[labels == label]
            assert (inside == 0).any(), "every class is trained on"
            assert count == 1 or (inside > 0).any(), "a class of two holds one out"
        assert set(parts) == ({0, 1, 2} if with_test else {0, 1})


def test_what_cannot_be_split_says_why():
    with pytest.raises(UserError, match="a class needs two images"):
        divide(np.array([0, 1, 2]), seed=1)
    with pytest.raises(UserError, match="a class needs two images"):
        divide(np.array([0, 0, 1]), seed=1, together=[[0, 1]])
    with pytest.raises(UserError, match="three shares"):
        divide(np.repeat([0, 1], 20), seed=1, shares=(80, 20), with_test=True)


def test_what_a_split_says_stays_and_copies_follow():
    recorded = np.array([2, 0, -1, -1, 1])
    assert extend(recorded, np.array([0, 1, 1, 0, 0]), [[0, 2]]).tolist() == [2, 0, 2, 0, 1]


def test_equal_checksums_are_not_enough():
    sums = np.array([7, 7, 7, 0, 0, 9], np.uint32)
    assert same_pictures(sums, lambda place: b"a" if place < 2 else b"b") == [[0, 1]]
