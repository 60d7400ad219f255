"""Which candidates complement each other."""

from collections import Counter
from collections.abc import Callable, Sequence

from .grid import Candidate


def forward_selection(
    candidates: Sequence[Candidate],
    score: Callable[[tuple[Candidate, ...]], float],
    k: int,
    start: Sequence[Candidate] = (),
) -> list[tuple[tuple[Candidate, ...], float]]:
    """Add candidates one by one, each time the one with which the score is highest.

    It ends with `k` candidates, or earlier when none that is left would raise the score. Of several that raise it
    equally the first is taken. Takes about `k` times as many scores as there are candidates.

    Args:
        candidates: to choose from, the preferred ones first.
        score: of candidates that are used together, in the order in which they were chosen; more is better.
        k: how many to choose at most, those of `start` included.
        start: what is chosen already.

    Returns:
        What is chosen after each step and its score, that of `start` first if there is one.

    Raises:
        ValueError: there is nothing to choose from or `k` leaves no room, or a candidate is given twice.
    """
    if not candidates:
        raise ValueError('no candidates to choose from')
    if k <= len(start):
        raise ValueError(f'k is {k}; it must be larger than the number of candidates to start with, {len(start)}')
    for given in (candidates, start):
        if twice := [str(candidate) for candidate, number in Counter(given).items() if number > 1]:
            raise ValueError(f'candidates are given twice: {", ".join(twice)}')
    chosen = tuple(start)
    steps = [(chosen, score(chosen))] if chosen else []
    while len(chosen) < k:
        extended = [(*chosen, candidate) for candidate in candidates if candidate not in chosen]
        step = max(((each, score(each)) for each in extended), key=lambda step: step[1], default=None)
        if step is None or (steps and step[1] <= steps[-1][1]):
            break
        chosen = step[0]
        steps.append(step)
    return steps
