"""What the runs of a sweep differ in: `--grid`, `--list` and `--seeds`, checked against the configuration before anything is run."""

import ast
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_jax.config import is_key, leaf_keys
from sft_jax.errors import UserError, did_you_mean, reason_of

Overrides = dict[str, Any]  # dotted key -> value

_WORDS = {"true": True, "false": False}
_OPEN, _CLOSE = "([{", ")]}"
_QUOTES = "'\""


def spread_grid(argv: Sequence[str]) -> list[str]:
    """Returns a command line in which each of several values behind one --grid has a --grid of its own.

    >>> spread_grid(["sweep", "--grid", "adapter.rank=8,32", "optim.b2=0.9,0.98", "--json"])
    ['sweep', '--grid=adapter.rank=8,32', '--grid=optim.b2=0.9,0.98', '--json']
    """
    spread, in_grid = [], False
    for place, argument in enumerate(argv):
        followed = place + 1 < len(argv) and not argv[place + 1].startswith("-")
        if argument == "--grid" and followed:
            in_grid = True
        elif in_grid and not argument.startswith("-"):
            spread.append(f"--grid={argument}")
        else:
            in_grid = argument.startswith("--grid=")
            spread.append(argument)
    return spread


def read_grid(texts: Sequence[str]) -> list[Overrides]:
    """Returns the product of `KEY=V1,V2` texts, the last key varying fastest.

    Raises UserError for an unknown key, one that comes twice, and a text without values.

    >>> read_grid(["optim.learning_rate=1e-5,3e-5", "adapter.targets=['q','v']"])
    [{'optim.learning_rate': 1e-05, 'adapter.targets': ['q', 'v']}, {'optim.learning_rate': 3e-05, 'adapter.targets': ['q', 'v']}]
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not values.strip():
            raise UserError(f"--grid: '{text}' has no values; write KEY=V1,V2, such as --grid optim.learning_rate=1e-5,3e-5.")
        _check_key(key, "--grid")
        if key in axes:
            raise UserError(f"--grid: {key} is there twice; write all of its values behind one {key}=.")
        axes[key] = [_literal(value) for value in _split(values)]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def read_list(path: str) -> list[Overrides]:
    """Returns the overrides of a file with a JSON object of keys and values a line.

    Raises UserError, naming file and line, for what is none and for an unknown key.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"--list: {path} cannot be read ({reason}); name a file with a JSON object of overrides a line.") from error
    points = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            point = json.loads(line)
        except ValueError as error:
            raise UserError(f'{path}:{number}: is not JSON ({error}); write an object, such as {{"adapter.rank": 8}}.') from error
        if not isinstance(point, dict):
            raise UserError(f'{path}:{number}: must be an object of keys and values, such as {{"adapter.rank": 8}}.')
        for key in point:
            _check_key(key, f"{path}:{number}")
        points.append(point)
    if not points:
        raise UserError(f'{path}: is empty; write an object of overrides a line, such as {{"adapter.rank": 8}}.')
    return points


def read_seeds(text: str, first: int) -> list[int]:
    """Returns seeds: `first` and those that follow for a number of them, or the seeds of a list.

    >>> read_seeds("3", first=10), read_seeds("1,5", first=10)
    ([10, 11, 12], [1, 5])
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds: must be a number of seeds or a list of them, such as 3 or 0,1,2, not '{text}'.") from None
    if "," in text:
        if len(set(seeds)) < len(seeds):
            raise UserError(f"--seeds: {text} has a seed twice; each must be another one.")
        return seeds
    if seeds[0] < 1:
        raise UserError(f"--seeds: must be at least 1, not {seeds[0]}.")
    return list(range(first, first + seeds[0]))


def _check_key(key: str, where: str) -> None:
    """Raises UserError where `key` is none that holds a value."""
    known = leaf_keys()
    if key not in known:
        section = is_key(key) and " is a section; name a key of it:" or " is no key of the configuration;"
        near = [name for name in known if name.startswith(f"{key}.")] if is_key(key) else known
        raise UserError(f"{where}: '{key}'{section} {did_you_mean(key, near)}.")


def _split(text: str) -> list[str]:
    """Returns the parts between commas that stand outside of brackets and quotes.

    >>> _split("[1,2],'a,b',c")
    ['[1,2]', "'a,b'", 'c']
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        depth += 0 if quote else (character in _OPEN) - (character in _CLOSE)
        if character == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _literal(text: str) -> Any:
    """Returns a value as a flag would be understood: a Python literal, true or false, else the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
