"""One JSON object an example, a line each."""

import json
from typing import Any

import numpy as np

from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.inspection.details import Detail
from sft_jax.inspection.fragments import supervised_text


def record(detail: Detail, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what `--json` writes of an example; the README has the fields. Weights read as float32 are exact."""
    return {
        "set": detail.set,
        "split": detail.split,
        "file": detail.file,
        "line": detail.line,
        "turn": detail.turn,
        "class": class_name(detail) or None,
        "text": detail.text,
        "ids": detail.ids.tolist(),
        "weights": _short(detail.weights),
        "supervised_text": supervised_text(tokenizer, detail.ids, detail.weights),
        "problem": detail.problem or None,
        "beyond_cap": bool(detail.note),
    }


def line(detail: Detail, tokenizer: Tokenizer) -> str:
    """Returns the record as one line in ASCII, so that it is the same in every locale and holds no control character."""
    return json.dumps(record(detail, tokenizer))


def class_name(detail: Detail) -> str:
    """Returns how the row became examples as users see it: "once", "cut", "per-turn", "plain"; "" where it did not."""
    return detail.kind.replace("_", "-")


def _short(weights: np.ndarray) -> list[float]:
    """Returns weights as floats of few digits that are the same float32: 0.1 and not 0.10000000149011612."""
    values, index = np.unique(weights, return_inverse=True)
    short = [float(str(value)) for value in values]
    return [short[place] for place in index.tolist()]
