"""Rope and layer kinds as config.json states them, in the old and in the new form."""

import math
from dataclasses import dataclass

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.families.fields import REQUIRED, Fields, layer_count
from sft_jax.model.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    QueryGrowth,
    RopeSpec,
    YarnScaling,
)

LOCAL, GLOBAL = "sliding_attention", "full_attention"
ORIGINAL = "original_max_position_embeddings"

# Rope type -> the fields that it reads. "original_max_position_embeddings" is written, and not read, beside others.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
_ALWAYS = ("rope_type", "type", "rope_theta", ORIGINAL, "partial_rotary_factor")


@dataclass(frozen=True)
class Rotation:
    """What a family does with rope, beside the numbers of config.json."""

    head_size: int
    interleaved: bool = False
    absent_theta: float | object = REQUIRED  # where config.json names none
    absent_part: float | None = None  # of a head that is rotated where config.json does not say; None: always all of it
    aliases: tuple[str, ...] = ()  # other names of "longrope" in older files
    grows_queries: bool = False  # reads "llama_4_scaling_beta"


def read_rope(fields: Fields, rotation: Rotation) -> RopeSpec:
    """Returns the rope of a model that has one kind.

    transformers 5 writes `rope_parameters: {rope_theta, rope_type, ...}`, earlier versions `rope_theta` and
    `rope_scaling`. As in transformers, a section that states no theta falls back on the field beside it, and the
    original length beside the section goes before the one in it.
    """
    section = next((name for name in ("rope_scaling", "rope_parameters") if name in fields), None)
    if section is None:
        section = Fields({}, fields.where)
    else:
        section = fields.section(section).merged(fields.only_field(ORIGINAL))
    return read_rope_section(fields, section, "rope_theta", rotation)


def read_rope_section(fields: Fields, section: Fields, theta_name: str, rotation: Rotation) -> RopeSpec:
    """Returns the rope that `section` describes; `theta_name` is the field of `fields` that may hold its theta."""
    kind = section.text("rope_type", section.text("type", "default"))
    kind = "longrope" if kind in rotation.aliases else kind
    if kind not in ROPE_TYPES:
        raise UserError(f"{section.where}: rope type '{kind}' is not supported; {did_you_mean(kind, ROPE_TYPES)}.")
    own = ("llama_4_scaling_beta", "max_position_embeddings") if rotation.grows_queries else ()
    for name in section.names():
        if name not in (*ROPE_TYPES[kind], *_ALWAYS, *own):
            raise UserError(f"{section.where}: the field '{name}' is not known for the rope type '{kind}'.")
    theta = section.positive("rope_theta") if "rope_theta" in section else fields.positive(theta_name, rotation.absent_theta)
    size = _rotated(fields, section, rotation)
    scaling, magnitude = _scaling(fields, section, kind, size)
    growth = None
    if rotation.grows_queries and "llama_4_scaling_beta" in section:
        growth = QueryGrowth(section.number("llama_4_scaling_beta"), section.size(ORIGINAL))
    return RopeSpec(theta, size, rotation.interleaved, scaling, magnitude, growth)


def plain_rope(theta: float, rotation: Rotation) -> RopeSpec:
    """Returns the rope of a theta that stands alone."""
    return RopeSpec(theta, rotation.head_size, rotation.interleaved, None, 1.0, None)


def _rotated(fields: Fields, section: Fields, rotation: Rotation) -> int:
    """Returns how many channels of a head are rotated."""
    if rotation.absent_part is None:
        section.only("partial_rotary_factor", (None, 1))
        fields.only("partial_rotary_factor", (None, 1))
        size = rotation.head_size
    else:
        part = fields.positive("partial_rotary_factor", rotation.absent_part)
        size = int(rotation.head_size * section.positive("partial_rotary_factor", part))
    if size < 2 or size % 2 or size > rotation.head_size:
        raise UserError(
            f"{fields.where}: of a head of {rotation.head_size} channels an even number must be rotated, not {size}."
        )
    return size


def _scaling(fields: Fields, section: Fields, kind: str, size: int):
    """Returns the scaling and what is rotated is multiplied by."""
    if kind == "default":
        return None, 1.0
    if kind == "linear":
        return LinearScaling(section.positive("factor")), 1.0
    if kind == "dynamic":
        return DynamicScaling(section.positive("factor"), fields.size("max_position_embeddings")), 1.0
    original = section.size(ORIGINAL) if ORIGINAL in section else fields.size("max_position_embeddings")
    if kind == "llama3":
        low, high = section.positive("low_freq_factor"), section.positive("high_freq_factor")
        if not high > low:
            raise UserError(f"{section.where}: 'high_freq_factor' {high} must be above 'low_freq_factor' {low}.")
        return Llama3Scaling(section.positive("factor"), low, high, original), 1.0
    if "factor" in section:
        factor = section.positive("factor")
    else:
        factor = fields.size("max_position_embeddings") / original
    if kind == "yarn":
        scaling = YarnScaling(
            factor=factor,
            fast_turns=section.positive("beta_fast", 32.0),
            slow_turns=section.positive("beta_slow", 1.0),
            original_length=original,
            whole_channels=section.flag("truncate", True),
        )
        return scaling, section.positive("attention_factor", _yarn_magnitude(section, factor))
    scaling = LongScaling(
        section.positives("short_factor", size // 2), section.positives("long_factor", size // 2), original
    )
    magnitude = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return scaling, section.positive("attention_factor", magnitude)


def yarn_gain(factor: float, weight: float = 1.0) -> float:
    """Returns 0.1 * weight * log(factor) + 1, by which YaRN sharpens attention (arXiv:2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_magnitude(section: Fields, factor: float) -> float:
    over, under = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)
    return yarn_gain(factor, over) / yarn_gain(factor, under) if over and under else yarn_gain(factor)


def read_layer_kinds(fields: Fields, absent: list[str]) -> list[str]:
    """Returns LOCAL or GLOBAL for every layer: `layer_types`, or `absent` for a file that leaves it out."""
    count = layer_count(fields)
    if "layer_types" not in fields:
        return absent
    kinds = fields.strings("layer_types")
    for kind in kinds:
        if kind not in (LOCAL, GLOBAL):
            raise UserError(
                f"{fields.where}: 'layer_types' holds '{kind}'; {did_you_mean(str(kind), (LOCAL, GLOBAL))}."
            )
    if len(kinds) != count:
        raise UserError(f"{fields.where}: 'layer_types' has {len(kinds)} entries for {count} layers.")
    return kinds


def every(count: int, period: int) -> list[str]:
    """Returns the kinds of `count` layers of which every `period`-th is global; with a period of 0 none is local."""
    return [GLOBAL if period == 0 or (i + 1) % period == 0 else LOCAL for i in range(count)]


def refuse_mixed_layers(fields: Fields, only: str) -> None:
    """Raises UserError where `layer_types` says otherwise than that all layers are of the kind `only`."""
    if "layer_types" in fields and set(fields.strings("layer_types")) != {only}:
        raise UserError(f"{fields.where}: 'layer_types' must be '{only}' for every layer of this architecture.")


def read_ropes_by_kind(fields: Fields, rotation: Rotation, local_theta: str) -> dict[str, RopeSpec]:
    """Returns the ropes of LOCAL and of GLOBAL layers; `local_theta` is the field of the local theta in old files.

    An old file's `rope_scaling` is of the global layers, also beside the new form.
    """
    if "rope_parameters" in fields:
        section = fields.section("rope_parameters")
        whole = section.section(GLOBAL)
        for part in (whole, section.section(LOCAL)):
            part.only("truncate", (None, True))  # the reference looks for it beside the sections
        if "rope_scaling" in fields:
            whole = whole.merged(fields.section("rope_scaling"))
        return {
            LOCAL: read_rope_section(fields, section.section(LOCAL), local_theta, rotation),
            GLOBAL: read_rope_section(fields, whole, "rope_theta", rotation),
        }
    scaled = fields.section("rope_scaling") if "rope_scaling" in fields else Fields({}, fields.where)
    return {
        LOCAL: plain_rope(fields.positive(local_theta, rotation.absent_theta), rotation),
        GLOBAL: read_rope_section(fields, scaled, "rope_theta", rotation),
    }
