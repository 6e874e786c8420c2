"""Answers that are to be JSON."""

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError
from sft_jax.evaluation.scoring import Answer, Scorer, mean_of

_INVALID = object()


def parse(text: str) -> Any:
    """Returns the value of a text that is JSON and nothing else, `_INVALID` for any other; NaN and Infinity are no JSON."""

    def refuse(constant: str):
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _INVALID


def is_json(generation: str, reference: str = "") -> bool:
    """Returns whether the generation is JSON, the whole of it.

    >>> is_json('{"a": 1}'), is_json('{"a": 1} and more')
    (True, False)
    """
    return parse(generation) is not _INVALID


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yields (path, value as JSON) of everything in a JSON value that holds nothing else; an empty object or list is one.

    >>> list(leaves({"a": {"b": 1}, "c": [True, "x"]}))
    [(('a', 'b'), '1'), (('c', 0), 'true'), (('c', 1), '"x"')]
    """
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        number = isinstance(value, float) and value.is_integer()  # 1.0 and 1 are one number in JSON
        yield path, json.dumps(int(value) if number else value)


def fields(answer: Answer) -> tuple[float, float]:
    """Returns the statistics of the field-wise match: F1 over all fields of all answers, each a path with its value.

    What is missing counts against an answer as what is there and should not be does, and so does all of the reference where
    the answer is no JSON. An answer whose reference is no JSON is not counted.
    """
    expected, given = parse(answer.reference), parse(answer.generation)
    if expected is _INVALID:
        return 0.0, 0.0
    wanted = collections.Counter(leaves(expected))
    found = collections.Counter(() if given is _INVALID else leaves(given))
    return 2.0 * (wanted & found).total(), float(wanted.total() + found.total())


def schema(argument: str | None) -> Scorer:
    """Returns the scorer of answers that are JSON and valid under a JSON schema: that of a file, or a column of the row.

    Without an argument the schema is in the column `schema`, as an object or as text; FILE.json names one for all. Raises
    UserError where the schema is none, and where the package jsonschema is missing.
    """
    try:
        from jsonschema import validators
        from jsonschema.exceptions import SchemaError
    except ImportError as error:
        raise UserError("json_schema: needs the package jsonschema; install it with pip install 'sft_jax[scorers]'.") from error

    def validator(value: Any, where: str):
        kind = validators.validator_for(value, default=validators.Draft202012Validator)
        try:
            kind.check_schema(value)
        except SchemaError as error:
            raise UserError(f"json_schema: {where}: is no JSON schema ({error.message:.200}).") from error
        return kind(value)

    whole = None
    if argument is not None:
        path = Path(argument).expanduser()
        try:
            whole = validator(json.loads(path.read_text(encoding="utf-8")), argument)
        except (OSError, ValueError) as error:
            raise UserError(f"json_schema: {argument}: cannot be read as JSON ({error}); name a file with a JSON schema.") from error

    def statistics(answer: Answer) -> tuple[float, float]:
        check = whole
        if check is None:
            own = answer.row.get("schema")
            own = parse(own) if isinstance(own, str) else own
            if not isinstance(own, (dict, bool)):
                raise UserError("json_schema: a row has no JSON schema in its column schema; give it one, or name a file: json_schema:FILE.json.")
            check = validator(own, "the column schema")
        value = parse(answer.generation)
        return float(value is not _INVALID and check.is_valid(value)), 1.0

    return Scorer(statistics, needs_row=argument is None)


JSON_VALID = mean_of(is_json)
JSON_FIELDS = Scorer(fields)
