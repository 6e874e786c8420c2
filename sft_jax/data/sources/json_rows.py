"""One row of JSON text, and what JSON values are called."""

import datetime
import decimal
import json
from typing import Any

from sft_jax.data.examples import RowError

DEEPEST = 100  # lists and objects in each other


def parse_row(data: bytes) -> dict[str, Any]:
    """Returns the JSON object in `data`. Raises RowError saying what else it is."""
    row = parse_value(data)
    if not isinstance(row, dict):
        raise RowError(f"is {kind_of(row)}, not an object with named fields; correct or remove it.")
    return row


def parse_value(data: bytes) -> Any:
    """Returns the JSON value in `data`. Raises RowError where it is none, or one that workers could not be sent."""
    try:
        value = _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(
            f"is not UTF-8 (byte {error.start + 1} of the row is 0x{data[error.start]:02x}); save it as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise RowError(f"is not valid JSON ({error.msg} at {place}); correct or remove it.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise RowError(f"is JSON that cannot be read ({error}); correct or remove it.") from error
    if data.count(b"[") + data.count(b"{") > DEEPEST and _is_deep(value):
        raise RowError(f"has lists and objects in more than {DEEPEST} others; correct or remove it.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. A key that comes twice is refused: one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RowError(f"has the key {twice!r} twice in one object; keep one of them.")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # made once: json.loads would make one for every row


def _is_deep(value: Any) -> bool:
    layer = [value]
    for _ in range(DEEPEST + 1):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return bool(layer)


def text_or_bytes(value: bytes) -> str | bytes:
    """Returns text where the bytes are UTF-8, else the bytes, which no format reads."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def kind_of(value: Any) -> str:
    """Returns what a value of a row is, for messages. Files that are no JSON may hold more than JSON can.

    >>> kind_of([1])
    'a list'
    """
    if value is None:
        return "null"
    names = {
        bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object",
        bytes: "bytes that are no text in UTF-8", datetime.timedelta: "a duration", decimal.Decimal: "a number",
    }  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")
