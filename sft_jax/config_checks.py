"""Checks of single values of the configuration, each naming the key under which the value stands."""

import datetime
import math
import re
from collections.abc import Sequence
from typing import Any

from sft_jax.errors import UserError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")  # of messages
EXPRESSIONS = ("prompt", "completion", "instruction", "input", "output", "text", "system")  # columns that may be expressions
_OWN_VARIABLES = ("messages", "add_generation_prompt")  # of a chat template, which a run sets for each render
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def check_supervise(key: str, value: str) -> None:
    """Raises UserError unless `value` is "last", "all", or roles joined by commas."""
    if value in ("last", "all"):
        return
    for role in (part.strip() for part in value.split(",")):
        if role not in ROLES:
            known = did_you_mean(role, ["last", "all", *ROLES])
            raise UserError(f"{key}: '{value}': unknown role '{role}'; {known}. Roles are joined by commas.")


def check_columns(key: str, columns: Any) -> None:
    """Raises UserError for expressions where a name is needed, and for what is no role. What is no section is left to others."""
    if not isinstance(columns, dict):
        return
    for name, value in columns.items():
        if isinstance(value, str) and is_expression(value) and name not in EXPRESSIONS:
            raise UserError(f"{key}.{name}: {value!r}: only texts can be expressions: {', '.join(EXPRESSIONS)}; name a field.")
    roles = columns.get("roles")
    for name, role in (roles or {}).items() if isinstance(roles, dict) else ():
        if role not in ROLES:
            raise UserError(f"{key}.roles: {name!r} is to be {role!r}, which is no role; {did_you_mean(str(role), ROLES)}.")


def is_expression(column: str) -> bool:
    """Returns whether a value of `data.columns` is an expression over the fields of a row, not the name of one."""
    return "{{" in column or "{%" in column


def check_local(key: str, path: str) -> None:
    """Raises UserError for a URL: prepared data are read through memory maps."""
    found = _URL.match(path)
    if found:
        raise UserError(f"{key}: '{path}': {found.group()} is not a local disk; name a folder on one.")


def check_sampling(prefix: str, temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float) -> None:
    """Raises UserError for an option of sampling that is out of range, which it names behind `prefix`."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"{prefix}temperature: must be 0 (greedy) or a number above 0, not {temperature}.")
    if top_k < 0:
        raise UserError(f"{prefix}top_k: must be 0 (all tokens) or more, not {top_k}.")
    if not 0 < top_p <= 1:
        raise UserError(f"{prefix}top_p: must be above 0 and at most 1, not {top_p}.")
    if not 0 <= min_p <= 1:
        raise UserError(f"{prefix}min_p: must be 0 (all tokens) or more and at most 1, not {min_p}.")
    if not 0 < repetition_penalty < math.inf:
        raise UserError(f"{prefix}repetition_penalty: must be a number above 0, 1 for none, not {repetition_penalty}.")


def check_finite(key: str, value: float) -> float:
    """Returns `value` as a float. Raises UserError where it is none, such as infinity."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{key}: must be a finite number, not {number}.")
    return number


def check_template_arguments(key: str, arguments: dict[str, Any]) -> None:
    """Raises UserError for arguments that a chat template cannot be given.

    They are written into fingerprints, manifests and worker processes, so they are JSON values.
    """
    for name in _OWN_VARIABLES:
        if name in arguments:
            raise UserError(f"{key}: '{name}' is what every render sets itself; leave it out.")
    _check_json(key, arguments)


def check_date(key: str, date: str) -> None:
    """Raises UserError for what is neither empty nor a date such as "2026-01-31"."""
    try:
        known = not date or datetime.date.fromisoformat(date).isoformat() == date
    except ValueError:
        known = False
    if not known:
        raise UserError(f"{key}: '{date}' is no date; write it as 2026-01-31, or leave it out.")


def check_tokens(key: str, tokens: Sequence[str]) -> None:
    """Raises UserError for texts that cannot be tokens, and for one that is named twice."""
    for index, text in enumerate(tokens):
        if not text or text != text.strip():
            raise UserError(
                f"{key}[{index}]: {text!r}: a token is not empty, and neither begins nor ends with white space, which templates "
                "and tokenizers take away; leave it out."
            )
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(f"{key}[{index}]: {text!r} holds half of a surrogate pair, which no tokenizer can read.")
        if text in tokens[:index]:
            raise UserError(f"{key}: {text!r} is named twice; leave one of them out.")


def _check_json(key: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UserError(f"{key}: {name!r} is a {type(name).__name__}, not a name; write it as text.")
            _check_unicode(key, name)
            _check_json(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_json(f"{key}[{index}]", inner)
    elif isinstance(value, float):
        check_finite(key, value)
    elif isinstance(value, str):
        _check_unicode(key, value)
    elif not (value is None or isinstance(value, (bool, int))):
        kinds = "text, a number, true or false, None, a list or a dict of these"
        raise UserError(f"{key}: {value!r} is a {type(value).__name__}; give {kinds}.")


def _check_unicode(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{key}: {text!r} holds half of a surrogate pair, which no tokenizer can read; remove it.") from error
