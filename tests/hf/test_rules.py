"""The table of names is a bijection, and what does not match it is named on both sides."""

import pytest
from tiny_models import CONFIGS, abstract

from sft_jax.errors import UserError
from sft_jax.hf import names
from sft_jax.hf.rules import Piece, Rule, check_bijection, pieces_by_param, tensor_shape
from sft_jax.model.runs import Place, layer_places
from sft_jax.model.sharding import named_leaves

RULES = [Rule("top.weight", "embed.embedding"), Rule("layers.{layer}.up.weight", "mlp.up.kernel", transpose=True)]
PLACES = [Place(0, 0, 0), Place(0, 1, 0), Place(0, 0, 1)]  # layers 0 and 2 are stacked
PARAMS = {"embed.embedding": (5, 3), "runs.0.0.mlp.up.kernel": (2, 3, 7), "runs.0.1.mlp.up.kernel": (1, 3, 7)}
TENSORS = {"top.weight": (5, 3), **{f"layers.{i}.up.weight": (7, 3) for i in range(3)}}


def check(tensors, ignored=()):
    return check_bijection(pieces_by_param(RULES, PLACES), PARAMS, tensors, ignored, "DIR")


def test_pieces():
    assert pieces_by_param(RULES, PLACES) == {
        "embed.embedding": (Piece("top.weight", None, False),),
        "runs.0.0.mlp.up.kernel": (Piece("layers.0.up.weight", 0, True), Piece("layers.2.up.weight", 1, True)),
        "runs.0.1.mlp.up.kernel": (Piece("layers.1.up.weight", 0, True),),
    }


def test_tensor_shape():
    assert tensor_shape(Piece("x", None, False), (5, 3)) == (5, 3)
    assert tensor_shape(Piece("x", None, True), (5, 3)) == (3, 5)
    assert tensor_shape(Piece("x", 0, True), (2, 5, 3)) == (3, 5)
    assert tensor_shape(Piece("x", 0, False), (2, 5)) == (5,)


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


@pytest.mark.parametrize(
    "rules",
    [
        RULES[:1],  # a parameter that nothing fills
        [*RULES, Rule("layers.{layer}.gate.weight", "mlp.gate.kernel")],  # a rule for no parameter
        [*RULES, Rule("top.weight", "mlp.up.kernel")],  # a tensor used twice
        [*RULES, Rule("other.weight", "embed.embedding")],  # a parameter filled twice
    ],
)
def test_a_table_that_is_no_bijection_is_a_bug(rules):
    with pytest.raises(AssertionError):
        check_bijection(pieces_by_param(rules, PLACES), PARAMS, TENSORS, (), "DIR")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_of_every_family(name):
    """Every parameter of the decoder is named once, every layer has the same tensors, and no name is used twice."""
    decoder = abstract(name)
    pieces = pieces_by_param(names.rules(decoder.spec), layer_places(decoder.spec))
    params = {path: leaf.get_value().shape for path, leaf in named_leaves(decoder)}
    tensors = {part.name: tensor_shape(part, params[path]) for path, parts in pieces.items() for part in parts}
    assert check_bijection(pieces, params, tensors, (), "DIR") == []
    layers = [
        {n.replace(f".{i}.", ".") for n in tensors if f"layers.{i}." in n} for i in range(len(decoder.spec.layers))
    ]
    assert len(layers[0]) >= 9 and all(layer == layers[0] for layer in layers)
