"""The division into training, validation and test images: shares, classes, groups and copies.

Run: pytest tests/test_split.py
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from images.split import SHARES, divide, hold_out, united

SETTINGS = settings(max_examples=60, deadline=None, database=None, derandomize=True)
shares = st.one_of(
    st.just(SHARES),
    st.lists(st.integers(1, 20), min_size=3, max_size=3).map(lambda found: [100 * one / sum(found) for one in found]),
    st.lists(st.floats(1, 50), min_size=3, max_size=3).map(lambda found: [100 * one / sum(found) for one in found]),
)


def counted(labels, parts, many):
    """Images (class, part)."""
    return np.array([np.bincount(parts[labels == label], minlength=many) for label in np.unique(labels)])


@SETTINGS
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), shares, st.booleans(), st.integers(0, 2**40))
def test_parts_and_classes_within_them_are_within_one_image_of_their_share(more, asked, with_test, seed):
    if not with_test:
        asked = [100 * one / sum(asked[:2]) for one in asked[:2]]
    least = int(np.ceil(100 / min(asked)))  # a class gives one image at least, however small the share
    labels = np.repeat(np.arange(len(more)), [least + count for count in more])
    labels = np.random.default_rng(seed).permutation(labels)
    parts = divide(labels, seed=seed, shares=asked, with_test=with_test)
    found = counted(labels, parts, len(asked))
    exact = np.bincount(labels)[:, None] * np.array(asked) / 100
    assert found.sum() == len(labels)
    assert np.abs(found.sum(0) - exact.sum(0)).max() < 1 + 1e-6
    assert np.abs(found - exact).max() < 1 + 1e-6


@SETTINGS
@given(st.lists(st.integers(5, 60), min_size=1, max_size=12), st.integers(0, 2**40))
def test_a_fifth_of_each_class_is_the_fifth_that_scikit_learn_draws(counts, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    held = (2 * len(labels) + 5) // 10
    _, drawn = train_test_split(np.arange(len(labels)), test_size=held, stratify=labels, random_state=seed % 2**32)
    if np.abs(np.bincount(labels[drawn]) - 0.2 * np.array(counts)).max() <= 1:
        assert np.flatnonzero(divide(labels, seed=seed)).tolist() == sorted(drawn)


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
@pytest.mark.parametrize("classes", [1, 2])
def test_whole_shares_are_met_exactly(count, asked, parts, classes):
    labels = np.arange(count) % classes
    for seed in (0, 1, 42):
        assert tuple(np.bincount(divide(labels, seed=seed, shares=asked, with_test=len(asked) == 3))) == parts


@SETTINGS
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=12, max_size=200), shares, st.integers(0, 2**32)
)
def test_groups_stay_whole_and_parts_are_within_a_group_of_their_share(groups, asked, seed):
    labels = np.repeat([label for label, _ in groups], [size for _, size in groups])
    owner = np.repeat(np.arange(len(groups)), [size for _, size in groups])
    order = np.random.default_rng(seed).permutation(len(labels))
    labels, owner = labels[order], owner[order]
    together = [np.flatnonzero(owner == group).tolist() for group in range(len(groups))]
    if np.bincount(labels, minlength=1).max() < 1 or max(np.bincount([label for label, _ in groups])) < 3:
        return
    parts = divide(labels, seed=seed, shares=asked, with_test=True, together=together)
    assert all(len(set(parts[places])) == 1 for places in together)
    found = counted(labels, parts, 3)
    exact = np.bincount(labels)[np.unique(labels)][:, None] * np.array(asked) / 100
    if exact.min() >= 6:  # no class is too small to give a group to each part
        assert np.abs(found.sum(0) - exact.sum(0)).max() <= 6


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


@pytest.mark.parametrize("counts", [[1], [2], [3], [1, 2], [2, 2], [3, 1], [2, 3, 40], [2, 2, 2, 2]])
def test_small_classes_train_and_give_what_they_can(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    held = hold_out(labels, 0.2, 7, np.arange(len(labels)))
    given_up = np.bincount(labels[held], minlength=len(counts))
    assert all(0 < gave < count if count > 1 else gave == 0 for gave, count in zip(given_up, counts, strict=True))
