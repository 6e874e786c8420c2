"""A regular expression for the longest of many texts at a place."""

import re
from collections.abc import Iterable


def longest_of(texts: Iterable[str]) -> str:
    """Returns a regular expression for the longest of `texts` at a place: a trie, as there may be thousands.

    >>> longest_of(["ab", "abc", "b"])
    '(?:ab(?:c)?|b)'
    """
    tree: dict = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}

    def pattern(node: dict) -> str:
        branches = [re.escape(char) + pattern(child) for char, child in node.items() if char]
        if not branches:
            return ""
        if "" in node:
            return f"(?:{'|'.join(branches)})?"
        return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"

    return pattern(tree)
