"""Rules run both ways, the table of names is a bijection, and what does not match it is named on both sides."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, abstract, stored_tensors

from sft_jax.errors import UserError
from sft_jax.hf.rules import Packing, Rule, Stored, check_bijection, expand
from sft_jax.model.runs import Place

RULES = [Rule("top.weight", "embed.embedding"), Rule("layers.{layer}.up.weight", "mlp.up.kernel", transpose=True)]
PLACES = [Place(0, 0, 0), Place(0, 1, 0), Place(0, 0, 1)]  # layers 0 and 2 are stacked
PARAMS = {"embed.embedding": (5, 3), "runs.0.0.mlp.up.kernel": (2, 3, 7), "runs.0.1.mlp.up.kernel": (1, 3, 7)}
TENSORS = {"top.weight": (5, 3), **{f"layers.{i}.up.weight": (7, 3) for i in range(3)}}


def check(tensors, ignored=()):
    return check_bijection(expand(RULES, PLACES, PARAMS), tensors, ignored, "DIR")


def plain(shape, transpose=False, axis=0) -> Packing:
    return Packing((shape,), transpose, axis - len(shape), False)


def test_tensors_are_listed_layer_by_layer():
    rules = [*RULES, Rule("layers.{layer}.down.bias", "mlp.down.bias"), Rule("norm.weight", "final_norm.scale")]
    params = {**PARAMS, "runs.0.0.mlp.down.bias": (2, 3), "runs.0.1.mlp.down.bias": (1, 3), "final_norm.scale": (3,)}
    up, down = plain((7, 3), transpose=True), plain((3,))
    assert expand(rules, PLACES, params) == [
        Stored("top.weight", ("embed.embedding",), (), plain((5, 3))),
        Stored("layers.0.up.weight", ("runs.0.0.mlp.up.kernel",), (0,), up),
        Stored("layers.0.down.bias", ("runs.0.0.mlp.down.bias",), (0,), down),
        Stored("layers.1.up.weight", ("runs.0.1.mlp.up.kernel",), (0,), up),
        Stored("layers.1.down.bias", ("runs.0.1.mlp.down.bias",), (0,), down),
        Stored("layers.2.up.weight", ("runs.0.0.mlp.up.kernel",), (1,), up),
        Stored("layers.2.down.bias", ("runs.0.0.mlp.down.bias",), (1,), down),
        Stored("norm.weight", ("final_norm.scale",), (), plain((3,))),
    ]


# ---- parts of a tensor, each case as the reference implementation takes it apart


def only(rule: Rule, params: dict) -> Stored:
    (tensor,) = expand([rule], [Place(0, 0, 0)], {f"runs.0.0.{path}": (1, *shape) for path, shape in params.items()})
    return tensor


def test_rows_of_one_kernel_after_another():
    """Phi-3's qkv_proj: q, k and v are ranges of its rows."""
    rule = Rule("l.{layer}.qkv.weight", ("q", "k", "v"), transpose=True)
    packing = only(rule, {"q": (3, 8), "k": (3, 2), "v": (3, 2)}).packing
    tensor = np.arange(36).reshape(12, 3)
    assert packing.shape == (12, 3) and [packing.rows(i) for i in range(3)] == [(0, 8), (8, 2), (10, 2)]
    for number, rows in enumerate((tensor[:8], tensor[8:10], tensor[10:])):
        np.testing.assert_array_equal(packing.cut(tensor, number), rows.T)


def test_columns_of_one_kernel_after_another():
    """GPT-2's c_attn, which is stored [in, out]; its bias has nothing but those columns."""
    packing = only(Rule("h.{layer}.c_attn.weight", ("q", "k", "v"), axis=1), dict.fromkeys("qkv", (3, 4))).packing
    tensor = np.arange(36).reshape(3, 12)
    assert packing.shape == (3, 12) and packing.rows(1) is None
    for number, columns in enumerate(np.split(tensor, 3, axis=1)):
        np.testing.assert_array_equal(packing.cut(tensor, number), columns)
    bias = only(Rule("h.{layer}.c_attn.bias", ("q", "k", "v")), dict.fromkeys("qkv", (4,))).packing
    assert bias.shape == (12,) and bias.rows(2) == (8, 4)


def test_columns_that_alternate():
    """GPT-OSS's gate_up_proj: `gate, up = gate_up[..., ::2], gate_up[..., 1::2]`, of all experts at once."""
    rule = Rule("l.{layer}.gate_up", ("gate", "up"), axis=2, interleaved=True)
    stored = only(rule, {"gate": (2, 3, 5), "up": (2, 3, 5)})
    tensor = np.arange(60).reshape(2, 3, 10)
    assert stored.index == (0,) and stored.packing.shape == (2, 3, 10) and stored.packing.rows(0) is None
    np.testing.assert_array_equal(stored.packing.cut(tensor, 0), tensor[..., ::2])
    np.testing.assert_array_equal(stored.packing.cut(tensor, 1), tensor[..., 1::2])
    rows = only(Rule("l.{layer}.x", ("a", "b"), interleaved=True), {"a": (4,), "b": (4,)}).packing
    assert rows.rows(0) is None  # alternating rows are no range
    np.testing.assert_array_equal(rows.cut(np.arange(8), 1), [1, 3, 5, 7])


def test_a_tensor_an_expert():
    """Qwen3-MoE: one [out, in] an expert; only some layers have experts."""
    rules = [
        Rule("l.{layer}.{expert}.up", "up", transpose=True, layers=(1, 2)),
        Rule("l.{layer}.up", "dense", layers=(0,)),
    ]
    places = [Place(0, 0, 0), Place(1, 0, 0), Place(1, 0, 1)]
    params = {"runs.0.0.dense": (1, 4), "runs.1.0.up": (2, 3, 5, 7)}
    stored = expand(rules, places, params)
    assert [(tensor.name, tensor.index) for tensor in stored] == [
        ("l.0.up", (0,)),
        *((f"l.{layer}.{expert}.up", (layer - 1, expert)) for layer in (1, 2) for expert in range(3)),
    ]
    assert stored[1].packing == plain((7, 5), transpose=True)


@st.composite
def tables(draw):
    """Random rules for two runs of layers, and the shapes of the parameters that they fill."""
    places = [Place(0, 0, 0), Place(0, 1, 0), Place(0, 0, 1), Place(0, 1, 1), Place(1, 0, 0)]
    rules, params = [], {}
    for number in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("root", "layer", "expert")))
        parts = tuple(f"p{number}_{part}" for part in range(draw(st.integers(1, 3))))
        dims = draw(st.integers(1, 3))
        shape = draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims))
        transpose = dims > 1 and draw(st.booleans())
        axis = draw(st.integers(-dims, dims - 1))
        interleaved = draw(st.booleans())
        layers = draw(st.sampled_from((None, [4], [0, 2]))) if kind != "root" else None  # whole stacks
        hf = {"root": "t{}", "layer": "l.{{layer}}.t{}", "expert": "l.{{layer}}.{{expert}}.t{}"}[kind].format(number)
        rules.append(Rule(hf, parts if len(parts) > 1 else parts[0], transpose, axis, interleaved, layers))
        for part in parts:
            stored = list(shape)
            if not interleaved:
                stored[axis] = draw(st.integers(1, 4))
            held = [*stored[:-2], stored[-1], stored[-2]] if transpose else stored
            leading = [3] if kind == "expert" else []
            if kind == "root":
                params[part] = tuple(held)
                continue
            for run, place, repeats, members in ((0, 0, 2, (0, 2)), (0, 1, 2, (1, 3)), (1, 0, 1, (4,))):
                if layers is None or set(members) <= set(layers):
                    params[f"runs.{run}.{place}.{part}"] = (repeats, *leading, *held)
    return expand(rules, places, params), params


@settings(max_examples=80, deadline=None)
@given(tables())
def test_import_after_export_is_the_identity(table):
    stored, params = table
    sizes = [math.prod(shape) for shape in params.values()]
    numbers = np.split(np.arange(sum(sizes), dtype=np.int32), np.cumsum(sizes)[:-1])
    held = {path: part.reshape(params[path]) for path, part in zip(params, numbers)}
    written = {t.name: t.packing.join([held[path][t.index] for path in t.paths]) for t in stored}
    assert check_bijection(stored, {name: x.shape for name, x in written.items()}, (), "DIR") == []
    assert sorted(np.concatenate([x.ravel() for x in written.values()])) == list(range(sum(sizes)))  # nothing twice
    read = {path: np.full(shape, -1) for path, shape in params.items()}
    for tensor in stored:
        for number, path in enumerate(tensor.paths):
            read[path][tensor.index] = tensor.packing.cut(written[tensor.name], number)
            rows = tensor.packing.rows(number)
            if rows is not None:  # the rows that streaming reads alone are that part
                alone = tensor.packing.part(number).cut(written[tensor.name][rows[0] : sum(rows)], 0)
                np.testing.assert_array_equal(alone, read[path][tensor.index])
    for path, array in held.items():
        np.testing.assert_array_equal(read[path], array)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_dimensions_before_those_of_the_tensor(interleaved, transpose):
    packing = Packing(((4, 3), (4, 3)), transpose, -2, interleaved)
    tensors = np.arange(48).reshape(2, 8, 3)
    parts = [packing.cut(tensors, number) for number in range(2)]
    for i, tensor in enumerate(tensors):
        np.testing.assert_array_equal(parts[1][i], packing.cut(tensor, 1))
    np.testing.assert_array_equal(packing.join(parts), tensors)
    np.testing.assert_array_equal(packing.join([jnp.asarray(part) for part in parts]), tensors)


# ---- matching a checkpoint


def test_a_match():
    assert check(TENSORS) == []
    assert check({**TENSORS, "layers.0.inv_freq": (4,)}, ignored=(r"layers\.\d+\.inv_freq",)) == ["layers.0.inv_freq"]


def test_ignored_names_match_as_a_whole():
    with pytest.raises(UserError, match="'layers.0.inv_freq.more'"):
        check({**TENSORS, "layers.0.inv_freq.more": (4,)}, ignored=(r"layers\.\d+\.inv_freq",))


def test_missing_and_unexpected_names_are_both_listed_with_the_nearest():
    tensors = {("layers.1.upp.weight" if name == "layers.1.up.weight" else name): s for name, s in TENSORS.items()}
    with pytest.raises(UserError) as error:
        check(tensors)
    assert "DIR: lacks 1 tensors" in str(error.value)
    assert "'layers.1.up.weight' (nearest: 'layers.1.upp.weight')" in str(error.value)
    assert "'layers.1.upp.weight' (nearest: 'layers.1.up.weight')" in str(error.value)


def test_long_lists_are_cut_with_a_count():
    with pytest.raises(UserError, match=r"holds 20 tensors that .*'z7' and 12 more\."):
        check({**TENSORS, **{f"z{i}": (1,) for i in range(20)}})


def test_a_wrong_shape():
    with pytest.raises(UserError, match=r"tensor 'layers.2.up.weight' has the shape \[3, 7\], .* asks for \[7, 3\] "):
        check({**TENSORS, "layers.2.up.weight": (3, 7)})


FUSED = ("embed.embedding", "other")


@pytest.mark.parametrize(
    ("rules", "params"),
    [
        (RULES[:1], {}),  # a parameter that nothing fills
        ([*RULES, Rule("layers.{layer}.gate.weight", "mlp.gate.kernel")], {}),  # a rule for no parameter
        ([*RULES, Rule("top.weight", "mlp.up.kernel")], {}),  # a tensor used twice
        ([*RULES, Rule("other.weight", "embed.embedding")], {}),  # a parameter filled twice
        ([RULES[0], Rule("layers.{layer}.up.weight", "mlp.up.kernel", layers=(0, 1))], {}),  # a stack with a hole
        ([*RULES, Rule("layers.{layer}.x", "mlp.up.kernel", layers=(2,))], {}),  # a slice filled twice
        ([Rule("top.weight", FUSED), RULES[1]], {"other": (5, 4)}),  # parts that do not fit together
        ([Rule("top.weight", FUSED, axis=1, interleaved=True), RULES[1]], {"other": (5, 4)}),  # unequal parts in turn
    ],
)
def test_a_table_that_is_no_bijection_is_a_bug(rules, params):
    with pytest.raises(AssertionError):
        expand(rules, PLACES, PARAMS | params)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_of_every_family(name):
    """Every parameter of the decoder is named once, every layer has the same tensors, and no name is used twice."""
    decoder = abstract(name)
    names = [tensor.name for tensor in stored_tensors(decoder, CONFIGS[name])]
    layers = [{n.replace(f".{i}.", ".") for n in names if f"layers.{i}." in n} for i in range(len(decoder.spec.layers))]
    assert len(layers[0]) >= 9 and all(layer == layers[0] for layer in layers)
