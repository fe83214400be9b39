"""Which of many combinations the fast tests take."""

import pytest


def by_turns(first, second):
    """Every pair of two lists, as parameters: fast are so few that each item is in one of them."""
    first, second = list(first), list(second)
    return [
        pytest.param(a, b, marks=() if i % len(second) == j % len(first) else pytest.mark.slow)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]
