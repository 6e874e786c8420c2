"""Which format the rows of a data set have: all of them are looked at."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sft_jax.config import ColumnsConfig
from sft_jax.config_checks import is_expression
from sft_jax.data.examples import RowError, in_message
from sft_jax.data.formats.expressions import fields_of
from sft_jax.data.formats.registry import FORMATS, Format
from sft_jax.data.sources.registry import Rows
from sft_jax.errors import UserError, did_you_mean

_BLOCK = 1024  # rows that are read in one go


def resolve_format(name: str, rows: Rows, columns: ColumnsConfig, skip_bad_rows: bool = False) -> str:
    """Returns the format that `data.format` names, or with "auto" the one that the rows have.

    Raises UserError for a column that the format has not, a named optional column that no row has, and as
    `detect_format` does.
    """
    if name == "auto":
        return detect_format(rows, columns, skip_bad_rows)
    known = FORMATS[name].columns()
    for column in _named(columns):
        if column not in known:
            raise UserError(
                f"data.columns.{column}: the format '{name}' has no such field; {did_you_mean(column, known)}."
            )
    missing = set(_needed(FORMATS[name], columns))
    found: set[str] = set()
    scan = _scan(rows, strict=False)
    while not missing <= found and (each := next(scan, None)) is not None:
        found.update(each[1])
    _check_optional(FORMATS[name], columns, found)
    return name


@dataclass
class _Shape:
    """Rows that are alike in all that tells formats apart."""

    first: int  # number of the first of them
    misfits: dict[str, str]  # format -> why they do not fit it, "" where they do
    count: int = 0


def detect_format(rows: Rows, columns: ColumnsConfig, skip_bad_rows: bool = False) -> str:
    """Returns the name of the format that all rows have.

    What they hold is checked when they are read. Raises UserError naming the first row that does not fit, or two
    formats that both do. With `skip_bad_rows` the format that most rows have is enough.
    """
    named = _named(columns)
    candidates = {
        name: form for name, form in FORMATS.items() if all(column in form.columns() for column in named)
    }
    if not candidates:
        raise UserError(f"data.columns: no format has all of {', '.join(named)}; {_known_columns()}.")
    shapes, known = _shapes(rows, candidates, columns, strict=not skip_bad_rows)
    if not shapes:
        raise UserError(f"{rows.where(0)}: neither this row nor any other can be read; correct the file.")
    count = sum(shape.count for shape in shapes)
    fits = {name: sum(shape.count for shape in shapes if not shape.misfits[name]) for name in candidates}
    most = max(fits.values())
    if not most:
        first = shapes[0].first
        row = rows[first]
        near = [
            form.misfit(row, columns) for form in candidates.values() if form.turns[0] and form.has_fields(row, columns)
        ]
        raise UserError(
            f"{rows.where(first)}: fits no format; the row has: {in_message(', '.join(row)) or 'no field'}. "
            f"{''.join(f'{reason}. ' for reason in near)}Name its fields, such as "
            f"data.columns.prompt=question data.columns.completion=answer; {_known_columns()}."
        )
    best = [name for name in candidates if fits[name] == most]
    if len(best) > 1:
        raise UserError(_tie(rows, shapes, best))
    if most < count and not skip_bad_rows:
        odd = next(shape for shape in shapes if shape.misfits[best[0]])
        raise UserError(
            f"{rows.where(odd.first)}: is not in the format '{best[0]}', which {most} of {count} rows have: "
            f"{odd.misfits[best[0]]}. Correct the row, put rows of different formats into different data sets, or set "
            "data.bad_rows=skip."
        )
    _check_optional(FORMATS[best[0]], columns, known)
    return best[0]


def _shapes(
    rows: Rows, candidates: Mapping[str, Format], columns: ColumnsConfig, strict: bool
) -> tuple[list[_Shape], set[str]]:
    """Returns the shapes that the rows have, in the order in which they come up, and all fields."""
    names = sorted({name for form in candidates.values() for name in form.names(columns).values()})
    lists = sorted({form.names(columns)["messages"] for form in candidates.values() if form.turns[0]})
    keys = sorted({key for form in candidates.values() for key in form.turn_fields(columns) if key})
    shapes: dict[tuple, _Shape] = {}
    known: set[str] = set()
    for number, row in _scan(rows, strict):
        known.update(row)
        turns = [row.get(name) for name in lists]
        firsts = [each[0] if isinstance(each, list) and each else None for each in turns]
        alike = (
            *(row.get(name) is not None for name in names),
            *(isinstance(first, dict) and tuple(key in first for key in keys) for first in firsts),
        )
        shape = shapes.get(alike)
        if shape is None:
            misfits = {name: form.misfit(row, columns) for name, form in candidates.items()}
            shape = shapes[alike] = _Shape(number, misfits)
        shape.count += 1
    return list(shapes.values()), known


def _tie(rows: Rows, shapes: list[_Shape], best: list[str]) -> str:
    """Returns what to say where several formats have as many rows."""
    one, other = best[:2]
    differing = [
        next((shape for shape in shapes if not shape.misfits[a] and shape.misfits[b]), None)
        for a, b in ((one, other), (other, one))
    ]
    if all(differing):
        places = [rows.where(shape.first) for shape in differing]
        return (
            f"{places[0]} is in the format '{one}' and {places[1]} in the format '{other}', and as many rows are in the one "
            "as in the other; put rows of different formats into different data sets, or name the format and set "
            f"data.bad_rows=skip, such as data.format={one}."
        )
    first = next(shape for shape in shapes if not shape.misfits[one] and not shape.misfits[other])
    return (
        f"{rows.where(first.first)}: the rows fit the formats {' and '.join(best)}; name one, such as "
        f"data.format={one}."
    )


def _scan(rows: Rows, strict: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row) of all rows. Those that cannot be read raise UserError, or are left out."""
    for first in range(0, len(rows), _BLOCK):
        for number, row in enumerate(rows.read(first, min(first + _BLOCK, len(rows))), first):
            if not isinstance(row, RowError):
                yield number, row
            elif strict:
                raise UserError(f"{rows.where(number)}: {row}") from row


def _check_optional(form: Format, columns: ColumnsConfig, known: set[str]) -> None:
    """Raises UserError where an optional column was named and no row has it: the name must be wrong."""
    for name, column in _needed(form, columns).items():
        if name not in known:
            raise UserError(f"data.columns.{column}: no row has a field '{name}'; {in_message(did_you_mean(name, known))}.")


def _needed(form: Format, columns: ColumnsConfig) -> dict[str, str]:
    """Returns field -> column of the fields that some row should have: named optional ones, and those in expressions."""
    named = {column: getattr(columns, column) for column in (*form.required, *form.optional)}
    named = {column: name for column, name in named.items() if name and (column in form.optional or is_expression(name))}
    return {field: column for column, name in named.items() for field in fields_of(name)}


def _named(columns: ColumnsConfig) -> list[str]:
    return [field.name for field in fields(columns) if getattr(columns, field.name)]


def _known_columns() -> str:
    parts = (f"{name} ({', '.join(form.columns())})" for name, form in FORMATS.items())
    return f"formats and their data.columns: {', '.join(parts)}"
