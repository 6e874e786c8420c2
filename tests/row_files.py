"""Files of rows for tests."""

import gzip
import json

from sft_jax.data.examples import RowError
from sft_jax.data.sources.registry import open_rows
from sft_jax.errors import UserError


def write(folder, name, content):
    path = folder / name
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(*paths):
    rows = open_rows([str(path) for path in paths], "data.train")
    return [rows[index] for index in range(len(rows))], [rows.where(index).line for index in range(len(rows))]


def assert_rows_or_user_error(path, is_row):
    """Checks that a file is refused by name, or has rows each of which is one or raises RowError."""
    try:
        rows = open_rows([path], "data.train")
    except UserError as error:
        assert path in str(error)
        return
    assert len(rows) > 0
    for index in range(len(rows)):
        try:
            assert is_row(rows[index])
        except RowError:
            pass
