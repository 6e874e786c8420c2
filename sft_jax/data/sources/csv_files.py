"""CSV and TSV: fields between commas or tabs, quoted where they hold such, and a first line that names them."""

import csv
import io
import sys
from array import array
from functools import partial

import numpy as np

from sft_jax.data.examples import RowError, in_message
from sft_jax.data.sources.parts import File, Row
from sft_jax.data.sources.pieces import Piece
from sft_jax.data.sources.text_files import Index, TextFile, begin_of_text, suffix_of
from sft_jax.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
csv.field_size_limit(sys.maxsize)  # else 128 KiB, and a text may be longer


def open_csv(file: File) -> TextFile:
    """Opens a file of CSV, or TSV. Every field is text as it stands there, "" where it is empty; nothing is guessed.

    Lines that are blank are no rows. Raises UserError for a header that is none and for a quote that is never closed.
    """
    delimiter = DELIMITERS[suffix_of(file.path)]
    piece = file.shared.pieces.open(file.path, file.label)
    index = _index(piece, begin_of_text(piece, file.label), delimiter, file.label)
    names: list[str] = []
    if len(index.starts):
        names = _header(piece, index, delimiter, file.label)
        index = Index(*(part[1:] for part in index))
    kind = suffix_of(file.path)
    return TextFile(file, piece.size, f"{kind} {piece.sha256()}", index, partial(parse_fields, names, delimiter))


def parse_fields(names: list[str], delimiter: str, data: bytes) -> Row:
    """Returns the row in `data`, a record of CSV. Raises RowError."""
    fields = _fields(data, delimiter)
    if len(fields) != len(names):
        raise RowError(
            f"has {len(fields)} fields, but the header names {len(names)}; correct it: a field that holds a "
            f"{'comma' if delimiter == ',' else 'tab'}, a quote or a line break stands in double quotes."
        )
    return dict(zip(names, fields, strict=True))


def _fields(data: bytes, delimiter: str) -> list[str]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"is not UTF-8 (byte {error.start + 1} of the row is 0x{data[error.start]:02x}); save it as UTF-8."
        ) from error
    if "\0" in text:
        raise RowError("holds a NUL character, which is no text; remove it.")
    try:
        (fields,) = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    except csv.Error as error:
        reason = str(error).partition(" - ")[0]
        raise RowError(f"is not valid CSV ({reason}); a quote inside a quoted field is written twice.") from error
    return fields


def _index(piece: Piece, begin: int, delimiter: str, label: str) -> Index:
    """Returns where the records are, the header too. The same reader finds them that reads them later.

    Bytes are taken for Latin-1: delimiters, quotes and line breaks are ASCII, so records end at the same places as in
    UTF-8, and a wrong byte is an error of its own row only.
    """
    position, line = begin, 0

    def texts():
        nonlocal position, line
        for data in piece.lines(begin):
            position += len(data)
            line += 1
            yield data.decode("latin-1")

    starts, ends, lines = array("q"), array("q"), array("q")
    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    while True:
        start, first = position, line + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if position == piece.size and "unexpected end of data" in str(error):
                raise UserError(
                    f"{label}:{first}: a double quote in this row is never closed, so the rest of the file is in it; correct "
                    "the row."
                ) from error
            fields = [""]  # a row of its own, of which reading says what is wrong
        if fields:
            starts.append(start)
            ends.append(position)
            lines.append(first)
    return Index(*(np.array(part, np.int64) for part in (starts, ends, lines)))


def _header(piece: Piece, index: Index, delimiter: str, label: str) -> list[str]:
    """Returns the names of the fields. Raises UserError where the first row cannot be that."""
    start, end = int(index.starts[0]), int(index.ends[0])
    place = f"{label}:{int(index.lines[0])}"
    try:
        names = _fields(piece.read(start, end - start), delimiter)
    except RowError as error:
        raise UserError(f"{place}: the header {error}") from error
    seen: set[str] = set()
    for name in names:
        if not name.strip():
            raise UserError(f"{place}: the header has a field without a name; the first line names every field.")
        if name in seen or seen.add(name):
            raise UserError(f"{place}: the header has the field {in_message(repr(name))} twice; names must differ.")
    other = next((mark for mark in (",", ";", "\t") if mark != delimiter and mark in names[0]), None)
    if len(names) == 1 and other:
        raise UserError(
            f"{place}: the header is one field, {in_message(repr(names[0]))}; fields are separated by {delimiter!r} in this kind of file, "
            f"not by {other!r}."
        )
    return names
