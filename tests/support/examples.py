"""How many examples a property test tries: all of them in `make test-all`, a share of them in `make test`."""

from hypothesis import settings

LONG, SHORT = 100, 40
"""Of tests that say nothing of their own, in the long form and in the short one."""


def many(number: int) -> int:
    """So many examples in the long form, and in the short one as small a share of them as of all others.

    For tests whose inputs are the more telling the more there are: what a hostile peer sends.
    """
    return max(1, number * settings().max_examples // LONG)
