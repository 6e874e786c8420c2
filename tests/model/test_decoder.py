"""The decoder as a whole: its parameters, what its options may and may not change, and that no number is ignored."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import CONFIGS, FAMILY_CONFIGS, abstract, dotted, is_variable, packed_rows, random_decoder, randomized

from sft_jax.errors import UserError
from sft_jax.model.decoder import REMAT_POLICIES, Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.layers import Linear
from sft_jax.model.options import Options
from sft_jax.model.runs import layer_places, plan_runs
from sft_jax.model.sharding import AXES
from sft_jax.model import spec as spec_module
from sft_jax.model.spec import (
    ClampedGate,
    DecoderSpec,
    DynamicScaling,
    ExpertsSpec,
    LatentSpec,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    MlpSpec,
    NormSpec,
    QueryGrowth,
    RopeSpec,
    RouterSpec,
    YarnScaling,
)

logits = jax.jit(lambda decoder, *batch: decoder(*batch))


def params(decoder) -> dict:
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(decoder, is_leaf=is_variable)}


def test_parameters_of_llama():
    """Paths, shapes and logical axes, in full."""
    found = {path: (leaf.get_value().shape, leaf.axes) for path, leaf in params(abstract("llama_tied_biases")).items()}
    block = "runs.0.0."
    assert found == {
        "embed.embedding": ((96, 32), ("vocab", "embed")),
        block + "attention_norm.scale": ((3, 32), ("layers", "norm")),
        block + "attention.query.kernel": ((3, 32, 32), ("layers", "embed", "heads")),
        block + "attention.query.bias": ((3, 32), ("layers", "norm")),
        block + "attention.key.kernel": ((3, 32, 16), ("layers", "embed", "kv_heads")),
        block + "attention.key.bias": ((3, 16), ("layers", "norm")),
        block + "attention.value.kernel": ((3, 32, 16), ("layers", "embed", "kv_heads")),
        block + "attention.value.bias": ((3, 16), ("layers", "norm")),
        block + "attention.output.kernel": ((3, 32, 32), ("layers", "heads", "embed")),
        block + "attention.output.bias": ((3, 32), ("layers", "norm")),
        block + "mlp_norm.scale": ((3, 32), ("layers", "norm")),
        block + "mlp.gate.kernel": ((3, 32, 56), ("layers", "embed", "mlp")),
        block + "mlp.gate.bias": ((3, 56), ("layers", "norm")),
        block + "mlp.up.kernel": ((3, 32, 56), ("layers", "embed", "mlp")),
        block + "mlp.up.bias": ((3, 56), ("layers", "norm")),
        block + "mlp.down.kernel": ((3, 56, 32), ("layers", "mlp", "embed")),
        block + "mlp.down.bias": ((3, 32), ("layers", "norm")),
        "final_norm.scale": ((32,), ("norm",)),
    }
    assert params(abstract("llama"))["lm_head.kernel"].axes == ("embed", "vocab")
    assert params(abstract("llama"))[block + "attention.key.kernel"].units == {"kv_heads": 2}


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_declared_axes_fit_and_graph_is_static(name):
    decoder = abstract(name)
    for path, leaf in params(decoder).items():
        assert len(leaf.axes) == leaf.get_value().ndim and set(leaf.axes) <= set(AXES), path
        assert (leaf.axes[0] == "layers") == path.startswith("runs."), path
    graph, state = nnx.split(decoder)
    hash(graph)  # it can be a static argument
    assert params(nnx.merge(graph, state)).keys() == params(decoder).keys()


def test_gemma_is_stacked_by_period():
    decoder = abstract("gemma3")
    assert [(len(run.period), run.repeats) for run in plan_runs(decoder.spec.layers)] == [(3, 2), (1, 1)]
    shapes = {path: leaf.get_value().shape for path, leaf in params(decoder).items()}
    assert shapes["runs.0.2.attention.query_norm.scale"] == (2, 16)
    assert shapes["runs.1.0.post_mlp_norm.scale"] == (1, 32)


@pytest.mark.parametrize("name, identity", [("llama", 1.0), ("gemma2", 0.0)])  # Gemma multiplies by 1 + scale
def test_new_weights(name, identity):
    config = {**CONFIGS[name], "hidden_size": 128, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    drawn = params(Decoder(spec_from_config(config), Options(), jax.random.key(1), "bfloat16"))
    for path, leaf in drawn.items():
        values = np.asarray(leaf[...], np.float32)
        assert leaf.dtype == jnp.bfloat16, path
        if path.endswith("scale"):
            assert (values == identity).all(), path
        else:
            assert 0.018 < values.std() < 0.021 and np.abs(values).max() <= 0.0605, path
    kernel = np.asarray(drawn["runs.0.0.mlp.gate.kernel"][...], np.float32)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01, "layers of a stack were drawn alike"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scanned_equals_unrolled(name):
    """The runs against a plain loop over layers taken from their places."""
    decoder = random_decoder(name)
    tokens, positions, segments = packed_rows(np.random.default_rng(0), 2, 24)
    with jax.disable_jit():
        x = decoder.embed(tokens, positions)
        tables = decoder.rope_tables(positions)
        for layer, place in zip(decoder.spec.layers, layer_places(decoder.spec), strict=True):
            block = jax.tree.map(lambda leaf, i=place.index: leaf[i], decoder.runs[place.run][place.place])
            x, _ = block(x, tables[layer.rope], decoder.mask(layer, positions, segments, positions, segments, True))
        unrolled = decoder.head(decoder.final_norm(x))
    np.testing.assert_allclose(unrolled, logits(decoder, tokens, positions, segments), atol=1e-4)


def with_options(decoder: Decoder, options: Options) -> Decoder:
    """The same parameters under other options."""
    other = jax.eval_shape(lambda: Decoder(decoder.spec, options, jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(decoder))


# Two packed rows that end in padding, and a row of nothing else.
BATCH = [np.concatenate([rows, np.zeros_like(rows[:1])]) for rows in packed_rows(np.random.default_rng(0), 2, 24)]


@cache
def loss_and_gradient(options: Options):
    return jax.jit(jax.value_and_grad(lambda d: jnp.mean(d(*BATCH) ** 2)))(random_decoder("mistral", options))


@pytest.mark.parametrize("policy", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_no_gradient(policy, kernel="blocked"):
    value, gradient = loss_and_gradient(Options())
    other_value, other_gradient = loss_and_gradient(Options(remat=policy, attention=kernel))
    np.testing.assert_allclose(value, other_value, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)), "padding reached a gradient"
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 + 1e-4 * np.abs(one).max())


def test_remat_keeps_less():
    """Bytes that the forward pass hands to the backward pass, beside the parameters themselves."""

    def kept(policy):
        decoder = random_decoder("mistral", Options(remat=policy))
        residuals = jax.eval_shape(lambda d: jax.vjp(lambda d: d.hidden(*BATCH).sum(), d)[1], decoder)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    sizes = {policy: kept(policy) for policy in REMAT_POLICIES}
    assert sizes["offload"] == sizes["full"]  # wherever it lies
    assert sizes["full"] < 0.7 * sizes["dots"] and sizes["dots"] < 0.7 * sizes["none"], sizes


def test_bfloat16_compute():
    """Matmuls in bfloat16, parameters, gradients and logits in float32, and the result is near."""
    exact = random_decoder("llama")
    low = with_options(exact, Options(compute_dtype="bfloat16", precision="highest"))
    text = jax.jit(lambda d: d(*BATCH)).lower(low).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots and all(line.split(":")[-1].count("bf16") >= 2 for line in dots), dots
    assert jax.eval_shape(lambda d: d.hidden(*BATCH), low).dtype == jnp.bfloat16
    out = logits(low, *BATCH)
    assert out.dtype == jnp.float32
    error = np.abs(out - logits(exact, *BATCH)).max() / np.abs(out).max()
    assert 1e-4 < error < 0.1
    gradient = jax.eval_shape(jax.grad(lambda d: d(*BATCH).mean()), low)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """It is a sum over all rows: in bfloat16 it would be off by percents, and more with every row."""
    rng = np.random.default_rng(0)
    options = Options(compute_dtype="bfloat16")
    linear = Linear((8, 16), ("embed", "mlp"), True, jax.random.key(0), 0.02, "float32", options)
    x, d_y = (jnp.asarray(rng.normal(size=(4, 1000, size)) + 0.5, jnp.bfloat16) for size in (8, 16))
    _, pull = jax.jit(lambda linear: jax.vjp(lambda linear: linear(x), linear))(linear)
    (gradient,) = pull(d_y)
    expected = np.asarray(d_y, np.float64).sum((0, 1))
    np.testing.assert_allclose(gradient.bias[...], expected, rtol=1e-5)


def test_activations_are_laid_out_by_known_axes():
    seen = set()

    def constrain(x, axes):
        assert len(axes) == x.ndim and set(axes) <= {*AXES, None}
        seen.add(tuple(axes))
        return x

    decoder = abstract("llama", Options(constrain=constrain))
    jax.eval_shape(lambda d: d(np.zeros((2, 8), np.int32)), decoder)
    assert {("batch", "length", "act_embed"), ("batch", "length", "act_vocab")} <= seen


def test_positions_and_segments_may_be_left_out():
    decoder = random_decoder("mistral")
    tokens, positions, segments = packed_rows(np.random.default_rng(0), 2, 24)
    np.testing.assert_array_equal(logits(decoder, tokens, None, segments), logits(decoder, tokens, positions, segments))
    ones, counted = np.ones_like(tokens), np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    np.testing.assert_array_equal(logits(decoder, tokens), logits(decoder, tokens, counted, ones))


@pytest.mark.parametrize(
    "options, message",
    [
        (Options(remat="ful"), "model.remat: unknown policy 'ful'; did you mean 'full'"),
        (Options(attention="dense"), "model.attention: unknown kernel 'dense'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Decoder(spec_from_config(CONFIGS["llama"]), options, jax.random.key(0))


# Models in which, together, every field of the spec has something to act on.
_ROPE = RopeSpec(100.0, 8, False, Llama3Scaling(8.0, 1.0, 4.0, 16), 1.2, QueryGrowth(0.5, 4))
_MLP = MlpSpec(24, True, "silu", True)
_ROUTER = RouterSpec("softmax", True, True, groups=4, chosen_groups=2, group_score="max", normalize=False, scale=1.5)
_EXPERTS = ExpertsSpec(8, 3, 20, "silu", True, _ROUTER, shared_size=12, shared_gate=True)
_BASE = dict(
    vocab_size=32, hidden_size=16, heads=4, kv_heads=2, head_size=8, value_size=8, norm=NormSpec("rms", 1e-2, 0.5, True),
    pre_norms=True, post_norms=True, parallel=False, query_key_norm="head", query_bias=True, output_bias=True, latent=None,
    sinks=True, attention_scale=0.5, attention_soft_cap=2.0, logit_soft_cap=2.0, logit_scale=1.3, embedding_scale=2.0,
    residual_scale=0.7, learned_positions=32, tied_head=True, initializer_range=0.3,
)  # fmt: skip


def _layers(scaling, mlp=_MLP, size=8):
    return (LayerSpec(8, dataclasses.replace(_ROPE, scaling=scaling, size=size), mlp),)


_LATENT = LatentSpec(query_rank=12, key_value_rank=10, plain_size=4, rope_size=4, norm_epsilon=1e-2, bias=True)
EVERYTHING = {
    "two kinds of layers": DecoderSpec(**_BASE, layers=(
        *_layers(Llama3Scaling(8.0, 1.0, 4.0, 16)), LayerSpec(None, dataclasses.replace(_ROPE, scaling=LinearScaling(2.0)), _MLP),
    )),
    "dynamic": DecoderSpec(**_BASE, layers=_layers(DynamicScaling(4.0, 16))),
    "yarn": DecoderSpec(**_BASE, layers=_layers(YarnScaling(4.0, 3.0, 0.3, 24, False))),
    "longrope": DecoderSpec(**_BASE, layers=_layers(LongScaling((1.0, 1.1, 1.2, 1.3), (1.0, 2.0, 3.0, 4.0), 16))),
    "experts": DecoderSpec(**_BASE, layers=_layers(None, _EXPERTS)),
    "clamped experts": DecoderSpec(
        **_BASE,
        layers=_layers(None, dataclasses.replace(_EXPERTS, activation=ClampedGate(1.3, 0.4), shared_size=None, shared_gate=False)),
    ),
    "latent": DecoderSpec(
        **{**_BASE, "kv_heads": 4, "value_size": 6, "latent": _LATENT, "query_key_norm": None}, layers=_layers(None, size=4)
    ),
}  # fmt: skip
_STRINGS = {"kind": "layer", "activation": "gelu", "score": "sigmoid", "group_score": "top2", "query_key_norm": "projection"}
_TOGETHER = {"plain_size", "rope_size"}  # of a latent head, whose sum is head_size
TOKENS = np.random.default_rng(0).integers(0, 16, (1, 32))
SEGMENTS = np.array([[1] * 4 + [2] * 10 + [3] * 18])  # around the original lengths of the scalings, 16 and 8


def changes(node):
    """Every number, flag and choice below `node`: its owner and name, and a copy of `node` in which it alone is changed."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.name == "layers":
            for i, layer in enumerate(value):
                for name, changed in changes(layer):
                    yield name, dataclasses.replace(node, layers=(*value[:i], changed, *value[i + 1 :]))
        elif dataclasses.is_dataclass(value):
            for name, changed in changes(value):
                yield name, dataclasses.replace(node, **{field.name: changed})
            if field.name in ("rope", "scaling", "query_growth"):
                yield (type(node).__name__, field.name), dataclasses.replace(node, **{field.name: None})
        elif value is not None and field.name not in _TOGETHER:
            if isinstance(value, bool):
                other = not value
            elif isinstance(value, str):
                other = _STRINGS[field.name]
            elif isinstance(value, tuple):
                other = tuple(1.5 * number for number in value)
            elif isinstance(value, int):
                other = 2 * value if field.name in ("kv_heads", "learned_positions", "head_size") else value // 2
            else:
                other = value * 1.5
            yield (type(node).__name__, field.name), dataclasses.replace(node, **{field.name: other})


CHANGES: dict[tuple[str, str], tuple[DecoderSpec, DecoderSpec]] = {}
for _spec in EVERYTHING.values():
    for _name, _changed in changes(_spec):
        CHANGES.setdefault(_name, (_spec, _changed))


def test_every_field_is_tried():
    classes = [value for value in vars(spec_module).values() if dataclasses.is_dataclass(value)]
    fields = {(cls.__name__, field.name) for cls in classes for field in dataclasses.fields(cls)}
    parts = {("DecoderSpec", name) for name in ("layers", "norm", "latent")}
    parts |= {("LayerSpec", "mlp"), ("ExpertsSpec", "router")} | {("LatentSpec", name) for name in _TOGETHER}
    assert fields - parts == CHANGES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("field", CHANGES, ids=".".join)
def test_every_field_of_the_spec_changes_the_logits(field):
    """A constant that is read from config.json and then not passed on would leave them as they are."""
    spec, changed = CHANGES[field]
    if field[1] == "initializer_range":

        @partial(jax.jit, static_argnums=0)
        def draw(spec):
            return Decoder(spec, Options(), jax.random.key(0)).embed.embedding[...]

        np.testing.assert_allclose(draw(changed), 1.5 * draw(spec), rtol=1e-6)
        return
    one, other = run_uncompiled(spec), run_uncompiled(changed)
    assert np.isfinite(one).all() and np.isfinite(other).all()
    assert one.shape != other.shape or np.abs(one - other).max() > 1e-4


@cache
def run_uncompiled(spec: DecoderSpec) -> np.ndarray:
    """Logits of a model whose parameters depend on their path and shape only; compiling each would take longer."""
    decoder = randomized(jax.eval_shape(lambda: Decoder(spec, Options(), jax.random.key(0))))
    with jax.disable_jit():
        return np.asarray(decoder(TOKENS, None, SEGMENTS))
