"""Where the rows of a JSON or JSON Lines file begin and end, in bytes, so that any row can be read on its own."""

import hashlib
import json
import re

import numpy as np

from sft_jax.data.sources.json_rows import parse_row
from sft_jax.data.sources.parts import File
from sft_jax.data.sources.pieces import BLOCK, Piece
from sft_jax.data.sources.text_files import Index, TextFile, begin_of_text, suffix_of
from sft_jax.errors import UserError

SPACE = b" \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")


def open_json(file: File) -> TextFile:
    """Opens a file of JSON objects: lines of them, or in `.json` an array. Raises UserError as `index_file` does."""
    piece = file.shared.pieces.open(file.path, file.label)
    index, content = index_file(piece, file.label, suffix_of(file.path))
    return TextFile(file, piece.size, content, index, parse_row)


def index_file(piece: Piece, name: str, suffix: str) -> tuple[Index, str]:
    """Returns the rows of a file, and a hash of its bytes and of whether they are an array.

    A `.json` file is an array of rows, or holds a row on each line like `.jsonl`; its first character tells. Raises
    UserError, calling the file `name`, where it is empty, in UTF-16, or an array that is malformed.
    """
    begin = begin_of_text(piece, name)
    if suffix == ".json" and is_array(piece, begin):
        data = piece.read(0, piece.size)
        return index_array(data, begin, name), f"array {hashlib.sha256(data).hexdigest()}"  # the same bytes as lines are other rows
    index, digest = _index_lines(piece, begin)
    if suffix == ".json" and len(index.starts):
        _refuse_object(piece, name, index)
    return index, digest


def is_array(piece: Piece, begin: int) -> bool:
    """Returns whether a text of JSON that begins at byte `begin` is an array."""
    place, text = begin, b""
    while not (text := piece.read(place, BLOCK).lstrip(SPACE)) and place < piece.size:
        place += BLOCK
    return text.startswith(b"[")


def _index_lines(piece: Piece, begin: int) -> tuple[Index, str]:
    """Returns the lines that are not blank, looking at one block of the file after another."""
    digest = hashlib.sha256()
    starts, ends, numbers = [], [], []
    base, line, pending = 0, 1, begin  # byte of the block, number of the line that begins at byte `pending`
    while block := piece.read(base, BLOCK):
        digest.update(block)
        data = np.frombuffer(block, np.uint8)
        stops = np.flatnonzero(data == ord("\n")).astype(np.int64) + base
        firsts = np.concatenate([[pending], stops[:-1] + 1]) if len(stops) else stops
        starts.append(firsts)
        ends.append(stops)
        numbers.append(np.arange(line, line + len(stops)))
        line += len(stops)
        pending = int(stops[-1]) + 1 if len(stops) else pending
        base += len(block)
    if pending < base:
        starts.append(np.asarray([pending], np.int64))
        ends.append(np.asarray([base], np.int64))
        numbers.append(np.asarray([line], np.int64))
    if not starts:
        return Index(*(np.zeros(0, np.int64) for _ in range(3))), digest.hexdigest()
    index = Index(*(np.concatenate(parts).astype(np.int64) for parts in (starts, ends, numbers)))
    return _without_blank(piece, index), digest.hexdigest()


def _without_blank(piece: Piece, index: Index) -> Index:
    keep = index.ends > index.starts
    index = Index(*(part[keep] for part in index))
    first = np.zeros(len(index.starts), np.uint8)
    # Only a line whose first byte is white space can be blank, and few are.
    for offset in range(0, piece.size, BLOCK):
        block = np.frombuffer(piece.read(offset, BLOCK), np.uint8)
        here = slice(*np.searchsorted(index.starts, (offset, offset + len(block))))
        first[here] = block[index.starts[here] - offset]
    keep = np.ones(len(first), bool)
    for row in np.flatnonzero(np.isin(first, np.frombuffer(SPACE, np.uint8))).tolist():
        start, end = int(index.starts[row]), int(index.ends[row])
        keep[row] = bool(piece.read(start, end - start).strip(SPACE))
    return Index(*(part[keep] for part in index))


def index_array(data: bytes, begin: int, name: str) -> Index:
    """Returns the elements of a JSON array. Where several begin on one line, their lines are their numbers, from 1 on.

    The bytes are decoded as Latin-1, where one character is one byte: the structure of JSON is ASCII, so elements end
    at the same places as in UTF-8, in which each is read later.
    """
    text = data.decode("latin-1")
    decoder = json.JSONDecoder()
    newlines = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))

    def skip(position: int) -> int:
        return _SPACES.match(text, position).end()

    def fail(reason: str, position: int) -> UserError:
        line = int(np.searchsorted(newlines, position)) + 1
        return UserError(
            f"{name}:{line}: is not valid JSON ({reason}); correct the file, or write one row a line (.jsonl)."
        )

    starts, ends = [], []
    position = skip(skip(begin) + 1)
    if text[position : position + 1] == "]":
        position += 1
    else:
        while True:
            try:
                _, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                raise fail(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise fail(str(error), position) from error
            starts.append(position)
            ends.append(end)
            position = skip(end)
            mark = text[position : position + 1]
            position += 1
            if mark == "]":
                break
            if mark != ",":
                raise fail("Expecting ',' or ']'" if mark else "the file ends inside the array", position - 1)
            position = skip(position)
    if skip(position) != len(text):
        raise fail("Extra data after the array", skip(position))
    rows = np.asarray(starts, np.int64)
    found = np.searchsorted(newlines, rows).astype(np.int64) + 1
    if (found[1:] == found[:-1]).any():  # a line would not tell which row is meant
        found = np.arange(1, len(rows) + 1)
    return Index(rows, np.asarray(ends, np.int64), found)


def _refuse_object(piece: Piece, name: str, index: Index) -> None:
    """Raises UserError for a `.json` file that is one object over several lines, not a row on each line."""
    try:
        json.loads(piece.read(int(index.starts[0]), int(index.ends[0] - index.starts[0])))
        return
    except (ValueError, RecursionError):
        pass
    try:
        content = json.loads(piece.read(0, piece.size))
    except (ValueError, RecursionError):
        return  # malformed: reading the row says where
    fields = [field for field, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
    inside = f" (its field '{fields[0]}' is a list: save that)" if fields else ""
    raise UserError(f"{name}: is one JSON {type(content).__name__}, not an array of rows{inside}.")
