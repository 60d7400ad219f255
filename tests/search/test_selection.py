"""Tests for diffseg.search.selection."""

from collections import Counter

import pytest

from diffseg.search import Candidate
from diffseg.search.selection import forward_selection

COVERED = {  # what each candidate is good for; greedy cover: c, then a (b would add less), then d
    Candidate('a', 50): {1, 2, 9},
    Candidate('b', 50): {3, 4, 5},
    Candidate('c', 50): {3, 4, 5, 6, 7},
    Candidate('d', 50): {1, 8},
    Candidate('a', 200): {2},
}
CANDIDATES = list(COVERED)
A, B, C, D, A200 = CANDIDATES


def cover(chosen: tuple[Candidate, ...]) -> float:
    """How much they cover together: submodular, so that the gain of a candidate never grows."""
    return len(set().union(*(COVERED[candidate] for candidate in chosen)))


def test_each_step_adds_what_complements_the_earlier_ones():
    assert forward_selection(CANDIDATES, cover, 3) == [((C,), 5), ((C, A), 8), ((C, A, D), 9)]


def test_it_ends_when_nothing_raises_the_score():
    assert forward_selection(CANDIDATES, cover, 5)[-1] == ((C, A, D), 9)
    assert forward_selection(CANDIDATES, lambda chosen: -len(chosen), 5) == [((A,), -1)]


def test_more_wanted_than_there_are():
    assert forward_selection(CANDIDATES, len, 99)[-1] == (tuple(CANDIDATES), 5)


def test_of_equal_ones_the_first_is_taken():
    assert forward_selection([B, D, A], lambda chosen: 2 * len(chosen), 2)[-1] == ((B, D), 4)


def test_start_is_kept_and_scored():
    assert forward_selection(CANDIDATES, cover, 3, start=[B]) == [((B,), 3), ((B, A), 6), ((B, A, C), 8)]


def test_no_set_is_scored_twice():
    seen = Counter()

    def count(chosen: tuple[Candidate, ...]) -> float:
        seen[frozenset(chosen)] += 1
        return cover(chosen)

    forward_selection(CANDIDATES, count, 3)
    assert set(seen.values()) == {1} and len(seen) == 5 + 4 + 3


def test_errors():
    with pytest.raises(ValueError, match='no candidates'):
        forward_selection([], cover, 2)
    with pytest.raises(ValueError, match=r'k is 1.*larger than.* 1'):
        forward_selection(CANDIDATES, cover, 1, start=[B])
    with pytest.raises(ValueError, match='twice: a@50'):
        forward_selection([A, B, A], cover, 2)
