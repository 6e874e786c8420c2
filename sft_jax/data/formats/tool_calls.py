"""Calls of tools and the tools themselves, as rows write them: OpenAI's lists, JSON texts, ShareGPT's turns."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sft_jax.data.examples import RowError
from sft_jax.data.sources.json_rows import kind_of, parse_value

NOTHING = (None, "", "[]", "{}", [], {})  # how rows write that there are no tools, calls, images


class Call(NamedTuple):
    """A call of a tool, in the turn of an assistant."""

    name: str
    arguments: dict[str, Any]
    text: str  # the arguments as JSON, as the row has them where it has them as text
    id: str | None = None


class CallForm(NamedTuple):
    """How a template is given calls. Templates differ in what they accept; servers know that by hand."""

    as_text: bool  # arguments as JSON text, else as an object
    content: str | None  # of a turn that consists of calls only


# In the order in which they are tried: what servers give first.
CALL_FORMS = (CallForm(False, ""), CallForm(False, None), CallForm(True, ""), CallForm(True, None))


def read_calls(turn: Mapping[str, Any], where: str) -> tuple[Call, ...]:
    """Returns the calls of a turn: `tool_calls`, or the older `function_call`. Raises RowError."""
    given = [name for name in ("tool_calls", "function_call") if turn.get(name) not in NOTHING]
    if len(given) > 1:
        raise RowError(f"{where}: has both 'tool_calls' and 'function_call'; keep one of them.")
    if not given:
        return ()
    place, value = f"{where}.{given[0]}", turn[given[0]]
    if isinstance(value, str):
        value = _parsed(value, place)
    if given[0] == "function_call":
        return (_read_call(value, place),)
    if not isinstance(value, list):
        raise RowError(f"'{place}' is {kind_of(value)}, not a list of calls; correct the row.")
    return tuple(_read_call(call, f"{place}[{index}]") for index, call in enumerate(value))


def read_call_text(text: str, where: str) -> tuple[Call, ...]:
    """Returns the calls that a text holds: a JSON object with `name` and `arguments`, or a list of them. Raises RowError."""
    value = _parsed(text, where)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowError(f"'{where}' holds no call; correct the row.")
    return tuple(_read_call(call, where) for call in calls)


def read_tools(value: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    """Returns tools in OpenAI's form: a list, or JSON text of one; bare functions get `{"type": "function"}` around them.

    Raises RowError where that is no list of named tools.
    """
    if value in NOTHING:
        return None
    if isinstance(value, str):
        value = _parsed(value, where)
    if not isinstance(value, list):
        raise RowError(f"'{where}' is {kind_of(value)}, not a list of tools; correct the row.")
    tools = []
    for index, tool in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(tool, dict):
            raise RowError(f"'{place}' is {kind_of(tool)}, not a tool such as {{'type': 'function', 'function': ...}}; correct the row.")
        bare = "function" not in tool
        function = tool if bare else tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(f"{place}: has no 'name'; correct the row.")
        if tool.get("type") not in (None, "function"):
            raise RowError(f"{place}: tools of type {tool['type']!r} are not supported, only 'function'; leave such rows out.")
        inner = {name: value for name, value in tool.items() if name != "type"}
        tools.append({"type": "function", "function": inner} if bare else tool)
        _check_json(tool, place)
    return tuple(tools) or None


def call_dict(call: Call, form: CallForm) -> dict[str, Any]:
    """Returns a call as templates read it."""
    function = {"name": call.name, "arguments": call.text if form.as_text else call.arguments}
    return {"type": "function", **({"id": call.id} if call.id is not None else {}), "function": function}


def texts_in(value: Any) -> Iterator[str]:
    """Yields every text in a JSON value, names of fields too."""
    yield from field_names(value)
    for path in value_paths(value):
        yield value_at(value, path)


def field_names(value: Any) -> Iterator[str]:
    """Yields the name of every field in a JSON value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from field_names(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from field_names(inner)


def value_paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yields the path of every text in a JSON value that is no name of a field."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from value_paths(inner, (*path, name))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from value_paths(inner, (*path, index))


def value_at(value: Any, path: Sequence[str | int]) -> Any:
    """Returns what lies at a path in a JSON value."""
    for step in path:
        value = value[step]
    return value


def with_value_at(value: Any, path: Sequence[str | int], new: Any) -> Any:
    """Returns a JSON value with another value at a path; what is not on the path is shared."""
    if not path:
        return new
    result = dict(value) if isinstance(value, Mapping) else list(value)
    result[path[0]] = with_value_at(value[path[0]], path[1:], new)
    return result


def _read_call(call: Any, where: str) -> Call:
    if not isinstance(call, dict):
        raise RowError(f"'{where}' is {kind_of(call)}, not a call with 'name' and 'arguments'; correct the row.")
    kind = call.get("type")
    if kind not in (None, "function"):
        raise RowError(f"{where}: calls of type {kind!r} are not supported, only 'function'; leave such rows out.")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise RowError(f"'{where}.function' is {kind_of(function)}, not an object with 'name' and 'arguments'; correct the row.")
    name, id_ = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name:
        raise RowError(f"{where}: has no 'name'; correct the row.")
    if id_ is not None and not isinstance(id_, str):
        raise RowError(f"'{where}.id' is {kind_of(id_)}, not text; correct the row.")
    arguments = function.get("arguments", function.get("parameters"))
    if arguments in (None, ""):  # a call without arguments
        arguments = {}
    text = arguments if isinstance(arguments, str) else ""
    if text:
        arguments = _parsed(text, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RowError(f"'{where}.arguments' is {kind_of(arguments)}, not an object; correct the row.")
    _check_json([name, id_, arguments, text], where)
    return Call(name, arguments, text or json.dumps(arguments, ensure_ascii=False), id_)


def _parsed(text: str, where: str) -> Any:
    """Returns what a JSON text in a row says, read as strictly as the row itself. Raises RowError."""
    _check_unicode(text, where)
    try:
        return parse_value(text.encode())
    except RowError as error:
        raise RowError(f"'{where}' {error}") from error


def _check_json(value: Any, where: str) -> None:
    """Raises RowError for a value that JSON cannot hold (files of other kinds may), or with text that is no Unicode."""
    if isinstance(value, str):
        _check_unicode(value, where)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise RowError(f"'{where}' holds a field whose name is {kind_of(name)}, not text; correct the row.")
            _check_unicode(name, where)
            _check_json(inner, where)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_json(inner, where)
    elif not isinstance(value, (int, float, type(None))) or isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"'{where}' holds {kind_of(value)}, which JSON cannot hold; correct the row.")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"'{where}' holds half of a surrogate pair at character {error.start + 1}; remove it.") from error
