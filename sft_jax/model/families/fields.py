"""Reading config.json strictly: what is missing, mistyped or not supported is named."""

from typing import Any

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.layers import ACTIVATIONS

REQUIRED = object()
MAX_NUMBER = 3e38  # of float32
MAX_LAYERS = 10_000  # far above every model; a damaged count would fill the memory before anything else is noticed

# Fields that change what a model computes and that no family here has, with the values that mean "off". A family's
# own fields are read by its function; anything else in the file is not read by the reference implementation either.
# tests/numerics/test_config_against_transformers.py compares.
UNSUPPORTED: dict[str, tuple] = {
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "attention_dropout": (None, 0),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
}


class Fields:
    """The fields of one config.json, or of a section of it. `absent` is what a field means when it is left out."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self._values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def names(self) -> list[str]:
        """Returns the names of the fields that have a value."""
        return [name for name, value in self._values.items() if value is not None]

    def refuse_unsupported(self) -> None:
        """Raises UserError naming the first field that changes the model in a way that is not supported."""
        for name, off in UNSUPPORTED.items():
            self.only(name, off)

    def only(self, name: str, allowed: tuple) -> None:
        """Raises UserError unless the field has one of the values `allowed`; None stands for null and for left out."""
        value = self._values.get(name)
        if value not in allowed:
            shown = value if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
            raise UserError(
                f"{self.where}: '{name}' is {shown}, which this decoder does not support; supported: "
                f"{', '.join(str(item) for item in allowed)}."
            )

    def merged(self, other: "Fields") -> "Fields":
        """Returns the fields of both; where both have one, that of `other`."""
        return Fields({**self._values, **other._values}, self.where)

    def only_field(self, name: str) -> "Fields":
        """Returns the field `name` alone, or nothing where it has no value."""
        return Fields({name: self._values[name]} if name in self else {}, self.where)

    def positive(self, name: str, absent: Any = REQUIRED) -> float:
        """Returns a finite number above 0: what divides, is divided by a root, or is raised to a power."""
        value = self._read(name, absent, (int, float), "a number")
        if not 0 < value < MAX_NUMBER:  # also where it is NaN
            raise UserError(f"{self.where}: '{name}' must be a number above 0, not {value}.")
        return float(value)

    def size(self, name: str, absent: Any = REQUIRED) -> int:
        """Returns a whole number above 0."""
        value = self._read(name, absent, (int,), "a whole number")
        if value < 1:
            raise UserError(f"{self.where}: '{name}' must be at least 1, not {value}.")
        return value

    def flag(self, name: str, absent: Any = REQUIRED) -> bool:
        """Returns true or false."""
        return self._read(name, absent, (bool,), "true or false")

    def optional_positive(self, name: str) -> float | None:
        """Returns a finite number above 0, or None for null; the field itself must be there."""
        return None if self._null(name) else self.positive(name)

    def optional_size(self, name: str) -> int | None:
        """Returns a whole number above 0, or None for null; the field itself must be there."""
        return None if self._null(name) else self.size(name)

    def section(self, name: str) -> "Fields":
        """Returns the fields of a dict."""
        return Fields(self._read(name, REQUIRED, (dict,), "a dict"), f"{self.where}: {name}")

    def strings(self, name: str) -> list[str]:
        """Returns a list of strings."""
        values = self._read(name, REQUIRED, (list,), "a list")
        for value in values:
            if not isinstance(value, str):
                raise UserError(f"{self.where}: '{name}' must hold strings only, not {value!r}.")
        return values

    def text(self, name: str, absent: Any = REQUIRED) -> str:
        """Returns a string."""
        return self._read(name, absent, (str,), "a string")

    def activation(self, name: str) -> str:
        """Returns the name of a known activation."""
        value = self._read(name, REQUIRED, (str,), "a string")
        if value not in ACTIVATIONS:
            raise UserError(f"{self.where}: '{name}' is '{value}'; {did_you_mean(value, ACTIVATIONS)}.")
        return value

    def _null(self, name: str) -> bool:
        if name not in self._values:
            self._missing(name)
        return self._values[name] is None

    def _read(self, name: str, absent: Any, kinds: tuple[type, ...], what: str):
        value = self._values.get(name)
        if value is None:
            return self._missing(name) if absent is REQUIRED else absent
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{self.where}: '{name}' must be {what}, not {value!r}.")
        return value

    def _missing(self, name: str):
        raise UserError(f"{self.where}: the field '{name}' is missing; the model cannot be built without it.")


def layer_count(fields: Fields) -> int:
    """Returns the number of layers."""
    count = fields.size("num_hidden_layers")
    if count > MAX_LAYERS:
        raise UserError(f"{fields.where}: 'num_hidden_layers' must be at most {MAX_LAYERS}, not {count}.")
    return count


def dimensions(fields: Fields, stated: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the fields of DecoderSpec that all families write alike.

    `stated` are sizes that must be in the file, because the reference implementation takes a number for them where they
    are left out that does not follow from the others. Raises UserError where a size is missing or does not fit.
    """
    for name in stated:
        fields.size(name)
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", absent=heads)  # left out by models without grouped queries
    if heads % kv_heads:
        raise UserError(
            f"{fields.where}: 'num_key_value_heads' {kv_heads} does not divide 'num_attention_heads' {heads}."
        )
    if "head_dim" not in fields and hidden % heads:
        raise UserError(
            f"{fields.where}: 'num_attention_heads' {heads} does not divide 'hidden_size' {hidden}; state 'head_dim'."
        )
    head_size = fields.size("head_dim", absent=hidden // heads)
    if head_size % 2:
        raise UserError(f"{fields.where}: the size of a head must be even for rotary positions, not {head_size}.")
    return dict(
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        mlp_size=fields.size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        norm_epsilon=fields.positive("rms_norm_eps"),
        initializer_range=fields.positive("initializer_range", absent=0.02),  # used for new weights only
    )
