"""Images used and images said to be left out are all that are there, in trees and tables that Hypothesis invents."""

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from test_listing import FILES, KNOWN, NAMES, assert_rows_account_for_all, assert_tree_accounts_for_all

TREES = st.lists(
    st.tuples(st.lists(st.sampled_from(NAMES), max_size=3), st.lists(st.sampled_from(FILES), unique=True)),
    min_size=4,
    max_size=9,
)
ROWS = st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["a", "b", "c", ""])), max_size=12)
MANY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@MANY
@given(TREES, st.sampled_from(KNOWN))
def test_images_used_and_images_said_to_be_left_out_are_all_that_are_there(tmp_path_factory, folders, known):
    assert_tree_accounts_for_all(tmp_path_factory.mktemp("tree"), folders, known)


@MANY
@given(ROWS, st.booleans())
def test_a_table_accounts_for_every_image(tmp_path_factory, rows, known):
    assert_rows_account_for_all(tmp_path_factory.mktemp("table"), rows, known)
