"""What the JSON files of a run hold, so that what has another shape is left out where it is read and stops nothing after it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

NUMBER = (int, float)


class Every(NamedTuple):
    """An object whose values all have one shape, whatever their names."""

    shape: Any


# A shape is a type or several, `Every`, or a dict of shapes by name, beside which there may be what nothing here reads.
Shape = Any

_OVER_LENGTH = {"policy": str, "dropped": int, "cut": int, "split": int, "supervised_tokens_lost": int}
_SET = {
    "format": str, "rows_read": int, "examples": int, "documents": int, "tokens": int, "supervised_tokens": int, "used_tokens": int,
    "used_supervised_tokens": int, "supervised_share": NUMBER, "rows_left_out": {"total": int}, "over_length": _OVER_LENGTH,
}  # fmt: skip
FILES: dict[str, Shape] = {
    "manifest.json": {"fingerprints": Every(str)},
    "summary.json": {"steps": int, "seconds": Every(NUMBER), "best": {"values": Every(NUMBER)}},
    "data_report.json": {"train": {"sets": Every(_SET)}, "eval": Every(_SET)},
}
TRAINING = dict.fromkeys(("loss", "accuracy", "learning_rate", "update_ratio", "grad_norm", "nonfinite_steps", "epoch"), NUMBER)
EVALUATION = {"loss": NUMBER}
SAMPLE = {
    "step": int, "set": str, "example": {"file": str, "line": int, "turn": int}, "prompt": str, "reference": str, "generation": str,
}  # fmt: skip


def fitting(value: Any, shape: Shape, name: str, misfits: list[str]) -> Any:
    """Returns a value of JSON without the parts that have another shape, whose names go to `misfits`; None where it has itself.

    What is null is left out, too, and is no misfit.
    """
    if value is None:
        return None
    if not isinstance(shape, (Every, dict)):
        fits = isinstance(value, shape) and not isinstance(value, bool)
        if not fits:
            misfits.append(name)
        return value if fits else None
    if not isinstance(value, Mapping):
        misfits.append(name)
        return None
    of = lambda key: shape.shape if isinstance(shape, Every) else shape.get(key)  # noqa: E731
    found = {key: part if of(key) is None else fitting(part, of(key), f"{name}.{key}" if name else key, misfits) for key, part in value.items()}
    return {key: part for key, part in found.items() if part is not None or of(key) is None}


def fits(value: Any, shape: Mapping[str, Shape]) -> bool:
    """Returns whether all that a shape names is there."""
    misfits: list[str] = []
    found = fitting(value, shape, "", misfits)
    return not misfits and found is not None and all(
        name in found and (not isinstance(part, dict) or fits(found[name], part)) for name, part in shape.items()
    )  # fmt: skip
