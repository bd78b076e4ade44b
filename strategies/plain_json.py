"""JSON of which nothing is known: from a disk that may be bad, or from a peer that may mean ill.

Python's own reader raises `RecursionError`, which is no `ValueError`, for text that is nested deeper than its stack. A
file or a message of a few bytes would go past every reader's `except ValueError` and end the process.
"""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes | bytearray, **how: Any) -> Any:
    """What `json.loads` gives.

    Args:
        text: of one value.
        how: `json.loads`'s own settings.

    Raises:
        ValueError: it is no JSON, or is nested deeper than anything that was written here.
    """
    try:
        return json.loads(text, **how)
    except RecursionError as error:
        raise ValueError("it is nested too deep to be ours") from error
