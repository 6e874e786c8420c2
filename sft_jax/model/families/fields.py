"""Reading config.json strictly: what is missing, mistyped or not supported is named."""

from typing import Any

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.mlp import ACTIVATIONS
from sft_jax.model.spec import DecoderSpec, LayerSpec, MlpSpec, NormSpec

REQUIRED = object()
MAX_NUMBER = 3e38  # of float32
MAX_LAYERS = 10_000  # far above every model; a damaged count would fill the memory before anything else is noticed

# Fields that change what a model computes, with the values that mean "off". Where a family's function has not read one,
# it must be off; anything else in the file is not read by the reference implementation either.
# tests/numerics/test_config_against_transformers.py compares.
UNSUPPORTED: dict[str, tuple] = {
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "attention_dropout": (None, 0),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "use_parallel_residual": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "moe_layer_freq": (None, 1),
    "scoring_func": (None,),
    "topk_method": (None,),
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
        self._read_names: set[str] = set()
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def names(self) -> list[str]:
        """Returns the names of the fields that have a value."""
        return [name for name, value in self._values.items() if value is not None]

    def refuse_unsupported(self) -> None:
        """Raises UserError naming the first field that changes the model, is not off, and was not read until now."""
        for name, off in UNSUPPORTED.items():
            if name not in self._read_names:
                self.only(name, off)

    def only(self, name: str, allowed: tuple) -> None:
        """Raises UserError unless the field has one of the values `allowed`; None stands for null and for left out."""
        self._read_names.add(name)
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

    def with_defaults(self, defaults: dict[str, Any]) -> "Fields":
        """Returns these fields, with those of `defaults` that are left out here."""
        return Fields({**defaults, **self._values}, self.where)

    def renamed(self, names: dict[str, str]) -> "Fields":
        """Returns the fields under other names: `names` maps those of this file to those that they have elsewhere."""
        renamed = Fields({names.get(name, name): value for name, value in self._values.items()}, self.where)
        renamed._read_names = self._read_names  # what is read there is read here
        self._read_names.update(names)
        return renamed

    def only_field(self, name: str) -> "Fields":
        """Returns the field `name` alone, or nothing where it has no value."""
        return Fields({name: self._values[name]} if name in self else {}, self.where)

    def positive(self, name: str, absent: Any = REQUIRED) -> float:
        """Returns a finite number above 0: what divides, is divided by a root, or is raised to a power."""
        value = self._read(name, absent, (int, float), "a number")
        if not 0 < value < MAX_NUMBER:  # also where it is NaN
            raise UserError(f"{self.where}: '{name}' must be a number above 0, not {value}.")
        return float(value)

    def number(self, name: str, absent: Any = REQUIRED) -> float:
        """Returns a finite number."""
        value = self._read(name, absent, (int, float), "a number")
        if not -MAX_NUMBER < value < MAX_NUMBER:
            raise UserError(f"{self.where}: '{name}' must be a finite number, not {value}.")
        return float(value)

    def size(self, name: str, absent: Any = REQUIRED) -> int:
        """Returns a whole number above 0."""
        value = self._read(name, absent, (int,), "a whole number")
        if value < 1:
            raise UserError(f"{self.where}: '{name}' must be at least 1, not {value}.")
        return value

    def count(self, name: str, absent: Any = REQUIRED) -> int:
        """Returns a whole number of 0 or more."""
        value = self._read(name, absent, (int,), "a whole number")
        if value < 0:
            raise UserError(f"{self.where}: '{name}' must be 0 or more, not {value}.")
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

    def positives(self, name: str, count: int) -> tuple[float, ...]:
        """Returns a list of `count` numbers above 0."""
        values = self._read(name, REQUIRED, (list,), "a list")
        sound = all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < MAX_NUMBER for v in values)
        if len(values) != count or not sound:
            raise UserError(f"{self.where}: '{name}' must be {count} numbers above 0.")
        return tuple(float(value) for value in values)

    def integers(self, name: str) -> list[int]:
        """Returns a list of whole numbers of 0 or more; nothing where the field is left out or null."""
        values = self._read(name, [], (list,), "a list")
        for value in values:
            if type(value) is not int or value < 0:
                raise UserError(f"{self.where}: '{name}' must hold whole numbers of 0 or more, not {value!r}.")
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
        self._read_names.add(name)
        if name not in self._values:
            self._missing(name)
        return self._values[name] is None

    def _read(self, name: str, absent: Any, kinds: tuple[type, ...], what: str):
        self._read_names.add(name)
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
    """Returns the sizes of DecoderSpec that all families write alike.

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
    return dict(
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        value_size=head_size,
        initializer_range=fields.positive("initializer_range", absent=0.02),  # used for new weights only
    )


def gated_mlp(fields: Fields, activation: str = "hidden_act", bias: bool = False) -> MlpSpec:
    """Returns the MLP of Llama's block; `activation` is the field that names it."""
    return MlpSpec(fields.size("intermediate_size"), True, fields.activation(activation), bias)


def rms_norm(fields: Fields, offset: float = 0.0) -> NormSpec:
    """Returns the RMSNorm that `rms_norm_eps` describes."""
    return NormSpec("rms", fields.positive("rms_norm_eps"), offset, bias=False)


def llama_like(
    sizes: dict[str, Any], layers: tuple[LayerSpec, ...], norm: NormSpec, tied_head: bool, **changes: Any
) -> DecoderSpec:
    """Returns a decoder of Llama's blocks with `changes`: what a family does in another way."""
    llama = dict(
        pre_norms=True,
        post_norms=False,
        parallel=False,
        query_key_norm=None,
        query_bias=False,
        output_bias=False,
        latent=None,
        sinks=False,
        attention_scale=sizes["head_size"] ** -0.5,
        attention_soft_cap=None,
        logit_soft_cap=None,
        logit_scale=1.0,
        embedding_scale=1.0,
        residual_scale=1.0,
        learned_positions=None,
    )
    return DecoderSpec(**(sizes | llama | dict(layers=layers, norm=norm, tied_head=tied_head) | changes))
