"""Rope and layer kinds as config.json states them, in the old and in the new form."""

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.families.fields import REQUIRED, Fields, layer_count
from sft_jax.model.spec import LinearScaling, Llama3Scaling, RopeSpec

LOCAL, GLOBAL = "sliding_attention", "full_attention"
ORIGINAL = "original_max_position_embeddings"

# Rope type -> the fields that it reads. "original_max_position_embeddings" is written, and not read, beside others.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ALWAYS = ("rope_type", "type", "rope_theta", ORIGINAL)


def read_rope(fields: Fields, absent_theta=REQUIRED) -> RopeSpec:
    """Returns the rope of a model that has one kind.

    transformers 5 writes `rope_parameters: {rope_theta, rope_type, ...}`, earlier versions `rope_theta` and
    `rope_scaling`. As in transformers, a section that states no theta falls back on the field beside it, and the
    original length beside the section goes before the one in it.
    """
    section = next((name for name in ("rope_scaling", "rope_parameters") if name in fields), None)
    if section is None:
        return RopeSpec(fields.positive("rope_theta", absent_theta), None)
    parameters = fields.section(section).merged(fields.only_field(ORIGINAL))
    return read_rope_section(fields, parameters, "rope_theta", absent_theta)


def read_rope_section(fields: Fields, section: Fields, theta_name: str, absent_theta=REQUIRED) -> RopeSpec:
    """Returns the rope that `section` describes; `theta_name` is the field of `fields` that may hold its theta."""
    kind = section.text("rope_type", section.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(f"{section.where}: rope type '{kind}' is not supported; {did_you_mean(kind, ROPE_TYPES)}.")
    section.only("partial_rotary_factor", (None, 1))
    for name in section.names():
        if name not in (*ROPE_TYPES[kind], *_ALWAYS, "partial_rotary_factor"):
            raise UserError(f"{section.where}: the field '{name}' is not known for the rope type '{kind}'.")
    theta = section.positive("rope_theta", None) if "rope_theta" in section else fields.positive(theta_name, absent_theta)
    if kind == "linear":
        return RopeSpec(theta, LinearScaling(section.positive("factor")))
    if kind == "llama3":
        length = section.size(ORIGINAL) if ORIGINAL in section else fields.size("max_position_embeddings")
        low, high = section.positive("low_freq_factor"), section.positive("high_freq_factor")
        if not high > low:
            raise UserError(f"{section.where}: 'high_freq_factor' {high} must be above 'low_freq_factor' {low}.")
        return RopeSpec(theta, Llama3Scaling(section.positive("factor"), low, high, length))
    return RopeSpec(theta, None)


def read_layer_kinds(fields: Fields, absent_period: int) -> list[str]:
    """Returns LOCAL or GLOBAL for every layer.

    From `layer_types`, or, in files that leave it out, from the rule that every `absent_period`-th layer is global.
    """
    count = layer_count(fields)
    if "layer_types" not in fields:
        return [GLOBAL if (i + 1) % absent_period == 0 else LOCAL for i in range(count)]
    kinds = fields.strings("layer_types")
    for kind in kinds:
        if kind not in (LOCAL, GLOBAL):
            raise UserError(
                f"{fields.where}: 'layer_types' holds '{kind}'; {did_you_mean(str(kind), (LOCAL, GLOBAL))}."
            )
    if len(kinds) != count:
        raise UserError(f"{fields.where}: 'layer_types' has {len(kinds)} entries for {count} layers.")
    return kinds


def refuse_mixed_layers(fields: Fields, only: str) -> None:
    """Raises UserError where `layer_types` says otherwise than that all layers are of the kind `only`."""
    if "layer_types" in fields and set(fields.strings("layer_types")) != {only}:
        raise UserError(f"{fields.where}: 'layer_types' must be '{only}' for every layer of this architecture.")
