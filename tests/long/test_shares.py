"""Shares of a division whatever the classes, groups and seeds are (hypothesis)."""

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split
from test_split import counted

from images.split import SHARES, divide

SETTINGS = settings(max_examples=60, deadline=None, database=None, derandomize=True)


shares = st.one_of(
    st.just(SHARES),
    st.lists(st.integers(1, 20), min_size=3, max_size=3).map(lambda found: [100 * one / sum(found) for one in found]),
    st.lists(st.floats(1, 50), min_size=3, max_size=3).map(lambda found: [100 * one / sum(found) for one in found]),
)


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
