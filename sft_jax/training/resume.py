"""Which keys of the configuration may change when a run is resumed, and what a longer run means for the schedule."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from sft_jax.config import ColumnsConfig, Config, DataSetConfig, to_dict
from sft_jax.errors import UserError

Rule = Literal["free", "longer", "override", "never"]

# First match wins; a key is matched by itself or by a section above it. Every key of the configuration has a rule.
RESUME_RULES: tuple[tuple[str, Rule], ...] = (
    ("mesh", "free"),
    ("log", "free"),
    ("eval", "free"),
    ("checkpoint", "free"),
    ("model.path", "override"),  # a base that was moved: its config.json and tokenizer are compared
    ("model.remat", "free"),  # how the same numbers are computed
    ("model.attention", "free"),
    ("model.compute_dtype", "override"),
    ("model.matmul_precision", "override"),
    ("model", "never"),
    ("data.eval", "free"),
    ("data.cache_dir", "free"),  # where and how fast data are prepared
    ("data.workers", "free"),
    ("data.row_timeout", "free"),
    ("data.row_memory_mb", "free"),
    ("data", "never"),
    ("adapter.path", "override"),  # an adapter that was moved; what it was is in the checkpoint
    ("adapter.dropout", "override"),
    ("adapter.lora_plus", "override"),
    ("adapter", "never"),  # parameters and the optimizer's state have its shape
    ("optim.name", "never"),  # the optimizer's state has its shape
    ("optim.groups", "never"),
    ("optim.state_dtype", "never"),
    ("optim.ema", "never"),  # nor is there an average before it is kept
    ("optim.momentum", "never"),  # without momentum there is no state for it
    ("optim", "override"),
    ("loss", "override"),
    ("train.steps", "longer"),
    ("train.epochs", "longer"),
    ("train.batch_size", "override"),
    ("train.normalize", "never"),  # written into the weights of the rows
    ("train.neftune", "override"),
    ("train.qat", "override"),
    ("train", "free"),
    ("seed", "never"),
)


def rule_for(key: str) -> Rule:
    """Returns the rule for a dotted key. Raises KeyError for a key that the table forgot."""
    for prefix, rule in RESUME_RULES:
        if key == prefix or key.startswith(prefix + "."):
            return rule
    raise KeyError(key)


def flat_keys(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of `to_dict(config)` by dotted key; a value that is itself a dict of the user's is one leaf."""
    flat = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key != "data.chat_template_kwargs":
            flat.update(flat_keys(value, key + "."))
        else:
            flat[key] = value
    return flat


_COLUMNS = dataclasses.asdict(ColumnsConfig())
_SET_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DataSetConfig) if field.default is None}


def _defaults() -> dict[str, Any]:
    return flat_keys(to_dict(Config()))


def check_changes(before: dict[str, Any], now: dict[str, Any], allowed: tuple[str, ...]) -> list[str]:
    """Returns a line for each key that differs between the run so far and this start.

    Args:
        before: `to_dict` of the configuration that the run was begun or last continued with.
        now: `to_dict` of the configuration of this start.
        allowed: Keys that may change by an explicit override (`checkpoint.allow_changes`).

    Raises:
        UserError: a key changed that may not, with what to do instead.
    """
    changes = []
    for key, old, new in differences(before, now):
        rule = rule_for(key)
        shorter = rule == "longer" and _is_shorter(old, new)
        if rule == "never":
            raise UserError(
                f"{key}: was {old!r} when this run began and is {new!r} now. It cannot change in the middle of a run: "
                "set it back, or start another run (model.path=WORKDIR begins from this one's weights)."
            )
        if (rule == "override" or shorter) and key not in allowed:
            raise UserError(
                f"{key}: was {old!r} so far and is {new!r} now. If that is meant, add "
                f"--config.checkpoint.allow_changes={','.join((*allowed, key))}; otherwise set it back."
            )
        changes.append(f"{key}: {old!r} -> {new!r}")
    return changes


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (key, old value, new value) for each key that differs between two `to_dict`, the first of which may be older
    than a key."""
    before, now = flat_keys(before), flat_keys(now)
    for key in ("data.train", "data.eval"):
        if key in before:
            before[key] = [
                {**_SET_DEFAULTS, **item, **({"columns": _COLUMNS | item["columns"]} if "columns" in item else {})} for item in before[key]
            ]
    before = {key: value for key, value in _defaults().items() if key in now} | before
    pairs = ((key, before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys()))
    return [
        (key, old, new) for key, old, new in pairs if old != new and not (key in ("model.path", "adapter.path") and _same_place(old, new))
    ]


def _same_place(old: str, new: str) -> bool:
    """Whether two spellings, such as a relative and an absolute one, name the same directory."""
    if not old or not new:
        return False
    old, new = Path(old).expanduser(), Path(new).expanduser()
    return new.is_dir() and old.resolve() == new.resolve()


def _is_shorter(old: Any, new: Any) -> bool:
    """Whether a run of `new` steps or epochs is shorter; 0 steps means that epochs decide."""
    return bool(old) and bool(new) and new < old or bool(old) != bool(new)
