"""Selection of candidates that complement each other."""

from collections import Counter
from collections.abc import Callable, Sequence

from .grid import Candidate


def forward_selection(
    candidates: Sequence[Candidate],
    score: Callable[[tuple[Candidate, ...]], float],
    k: int,
    start: Sequence[Candidate] = (),
) -> list[tuple[tuple[Candidate, ...], float]]:
    """Greedy forward selection: each step adds the candidate that gives the highest score.

    It ends with `k` candidates, or when no remaining one raises the score. Ties are broken in favour of the first.
    Takes about `k` times as many scores as there are candidates.

    Args:
        candidates: to select from, preferred ones first.
        score: of candidates that are used together, in the order of selection; higher is better.
        k: largest number of selected candidates, including `start`.
        start: candidates that are selected already.

    Returns:
        The selection after each step and its score, first those of `start` if there is one.

    Raises:
        ValueError: no candidates, `k` is not above the number in `start`, or a candidate is given twice.
    """
    if not candidates:
        raise ValueError('no candidates to choose from')
    if k <= len(start):
        raise ValueError(f'k is {k}; it must be larger than the number of candidates to start with, {len(start)}')
    for group in (candidates, start):
        if twice := [str(candidate) for candidate, number in Counter(group).items() if number > 1]:
            raise ValueError(f'candidates are given twice: {", ".join(twice)}')
    chosen = tuple(start)
    steps = [(chosen, score(chosen))] if chosen else []
    while len(chosen) < k:
        extended = [(*chosen, candidate) for candidate in candidates if candidate not in chosen]
        step = max(((extension, score(extension)) for extension in extended), key=lambda step: step[1], default=None)
        if step is None or (steps and step[1] <= steps[-1][1]):
            break
        chosen = step[0]
        steps.append(step)
    return steps
