"""Rows through the processes that prepare them, under templates that loop for ever, eat memory or look behind the sandbox."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from sft_jax.config_parsing import parse_config
from sft_jax.data.chats.templates import TEMPLATES
from sft_jax.data.prepare import prepare
from sft_jax.errors import UserError

HOSTILE = [  # templates that are to be stopped, or refused
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ messages.__class__ }}{{ 'x' * 9 ** 9 }}", "{{ '%99999d' % 1 }}",
]  # fmt: skip
_STOPPED = HOSTILE[:2]  # those that only the limits of workers end
_TRIGGER = "hostile row"
_LIMITS = {"row_timeout": 1.0, "row_memory_mb": 300}
_GOOD = {"messages": [{"role": "user", "content": "17 + 25?"}, {"role": "assistant", "content": "42."}]}


def try_workers(rows: list[dict[str, Any]], model: Path, folder: Path, choose: random.Random) -> Counter[str]:
    """Prepares rows as a run does, with one on which the template turns hostile, or with a template that always is.

    `model` is a directory with a tokenizer. Returns what came out. Raises AssertionError where rows are lost, or where a
    template that does not end is not stopped and told.
    """
    hostile, always = choose.choice(HOSTILE), choose.random() < 0.3
    source = hostile if always else f"{{% if messages[0].content == {_TRIGGER!r} %}}{hostile}{{% endif %}}{TEMPLATES['chatml']}"
    evil = {"messages": [{**_GOOD["messages"][0], "content": _TRIGGER}, _GOOD["messages"][1]]}
    rows = [_GOOD, *rows, evil]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    template, path = folder / "template.jinja", folder / "rows.jsonl"
    template.write_text(source)
    path.write_bytes(b"".join(json.dumps(row, default=str).encode() + b"\n" for row in rows))
    data = {"train": str(path), "cache_dir": str(folder / "cache"), "format": "messages", "chat_template": str(template),
            "max_length": 4096, "overlength": "drop", "bad_rows": "skip", "workers": 2, **_LIMITS}  # fmt: skip
    try:
        report = prepare(parse_config({"model": {"path": str(model)}, "data": data}).data, model_path=str(model), log=lambda line: None).report
    except UserError as error:
        message = str(error)
        message.encode()
        assert always, f"a hostile row stops all others: {message[:500]!r}"
        assert hostile not in _STOPPED or _names_limit(message), f"it is not told what was stopped: {message[:500]!r}"
        return Counter({"workers: template refused": 1})
    assert hostile not in _STOPPED or not always, "a template that does not end was let through"
    found = report["train"]["sets"]["train"]
    left_out = found["rows_left_out"]
    assert found["rows_read"] == len(rows) == found["rows_used"] + left_out["total"], f"rows were lost: {found}"
    stopped = [group for group in left_out["reasons"] if _names_limit(group["reason"])]
    assert hostile not in _STOPPED or stopped, f"a row that was stopped is not named: {left_out}"
    return Counter({"workers: rows": len(rows), "workers: rows left out": left_out["total"]})


def _names_limit(message: str) -> bool:
    return "data.row_timeout" in message or "data.row_memory_mb" in message
