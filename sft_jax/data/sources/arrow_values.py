"""Rows of Arrow tables as plain Python: what JSON would hold, as far as it can.

Text, numbers, true and false, null, lists and structs are what they are, but that fields of a struct that are null are absent:
all structs of a column have all its fields, those of other tools or calls too. Dates, times and decimals become text as Arrow writes them ("2024-01-31
12:00:00", "1.20"), durations whole numbers in their unit, maps objects, columns of Arrow's JSON type what they say, bytes
text where they are UTF-8. Other bytes and types stay, and a format that reads such a field refuses the row.
"""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from sft_jax.data.examples import RowError
from sft_jax.data.sources.json_rows import parse_value, text_or_bytes
from sft_jax.data.sources.parts import Row
from sft_jax.errors import UserError

Reader = Callable[[Any], Any]


def table_rows(table: pa.Table, name: str) -> list[Row | RowError]:
    """Returns the rows of a table. Raises UserError, calling its file `name`, for a column that cannot be read."""
    columns, readers = [], []
    for field, column in zip(table.schema, table.columns, strict=True):
        columns.append(_values(column, field.name, name))
        readers.append(_reader(column.type))
    names = table.column_names
    if not names:
        return [{} for _ in range(table.num_rows)]
    unreadable = [any(isinstance(value, RowError) for value in values) for values in columns]
    if not any(readers) and not any(unreadable):
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return [_row(names, readers, values) for values in zip(*columns, strict=True)]


def _row(names: list[str], readers: list[Reader | None], values: tuple) -> Row | RowError:
    row = {}
    for name, reader, value in zip(names, readers, values, strict=True):
        try:
            if isinstance(value, RowError):
                raise value
            row[name] = value if reader is None or value is None else reader(value)
        except RowError as error:
            return RowError(f"column '{name}': {error}")
    return row


def _values(column: pa.ChunkedArray, column_name: str, name: str) -> list:
    """Returns the values of a column; those that are no UTF-8 are RowErrors."""
    try:
        readable = _readable(column.type)
        column = column if readable == column.type else column.cast(readable)
        return column.to_pylist()
    except UnicodeDecodeError:  # Arrow files are not checked for it when they are read
        return [_value(value) for value in column]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise UserError(
            f"{name}: column '{column_name}' of type {column.type} cannot be read ({error}); leave the column out."
        ) from error


def _value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return RowError(f"is not UTF-8 ({error.reason}: byte 0x{error.object[error.start]:02x}); save it as UTF-8.")


def _readable(kind: pa.DataType) -> pa.DataType:
    """Returns the type that values of a type are cast to before they become Python's."""
    types = pa.types
    if types.is_temporal(kind) and not types.is_duration(kind) and not types.is_interval(kind) or types.is_decimal(kind):
        return pa.string()
    if types.is_duration(kind):
        return pa.int64()
    if types.is_dictionary(kind):
        inner = _readable(kind.value_type)
        return kind if inner == kind.value_type else inner
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_readable(kind.value_type)))
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_readable(kind.value_type)))
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_readable(kind.value_type)), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([field.with_type(_readable(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(_readable(kind.key_type), _readable(kind.item_type))
    return kind


def _reader(kind: pa.DataType) -> Reader | None:
    """Returns what makes plain Python of the values of a type, None where they are that."""
    types = pa.types
    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: parse_value(value.encode())
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return text_or_bytes
    if types.is_dictionary(kind):
        return _reader(kind.value_type)
    if types.is_map(kind):
        item = _reader(kind.item_type)
        return lambda pairs: _object(pairs, item)
    if isinstance(kind, pa.StructType):
        readers = {field.name: reader for field in kind if (reader := _reader(field.type))}
        # Null is what is absent: all structs of a column have all its fields, those of tools and arguments of calls too.
        return lambda value: {key: _read(readers.get(key), inner) for key, inner in value.items() if inner is not None}
    if isinstance(kind, _LISTS):
        item = _reader(kind.value_type)
        if types.is_list_view(kind) or types.is_large_list_view(kind):  # pyarrow's casts of them give broken arrays
            item = str if _readable(kind.value_type) == pa.string() else item
        return (lambda values: [_read(item, value) for value in values]) if item else None
    return None


_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)


def _read(reader: Reader | None, value: Any) -> Any:
    return value if reader is None or value is None else reader(value)


def _object(pairs: list[tuple[Any, Any]], item: Reader | None) -> dict[str, Any]:
    found = {_key(key): _read(item, value) for key, value in pairs}
    if len(found) < len(pairs):
        raise RowError("a map has the same key twice; keep one of them.")
    return found


def _key(key: Any) -> str:
    key = text_or_bytes(key) if isinstance(key, bytes) else key
    if isinstance(key, (str, int)) and not isinstance(key, bool):
        return str(key)
    raise RowError(f"a map has the key {key!r}, which is neither text nor a whole number; write keys as text.")
