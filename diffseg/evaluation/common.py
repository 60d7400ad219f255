"""What the metrics share."""

from collections.abc import Sequence
from typing import Any


def check_results(results: Sequence[Any], what: str) -> None:
    """Check that anything was evaluated.

    Args:
        results: of a metric.
        what: one of them, for the error.

    Raises:
        ValueError: there is none.
    """
    if not results:
        raise ValueError(
            f'there is no {what} to evaluate: the test data set is empty; look at data_root, data_prefix and ann_file '
            'of its config'
        )
