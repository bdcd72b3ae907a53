"""Dimensions that the caller gives at run time."""

from typing import List

import tilelang.language as T


def dimensions(names: str) -> List:
    """One dynamic dimension a name; names are separated by spaces and are what the launch calls them."""
    return [T.dynamic(name) for name in names.split()]
