"""Files of rows for tests."""

import gzip
import json

from sft_jax.data.sources import open_rows


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
