"""How the parameters of published models are laid out: one golden file per architecture, a line per parameter.

A changed line is a changed layout, which changes memory and speed of every run: look at it, then write the files anew
with `SFT_JAX_UPDATE_GOLDENS=1 pytest tests/contracts/test_layout_golden.py`.
"""

import math
import os
from pathlib import Path

import jax
import pytest
from published_configs import PUBLISHED, published_config

from sft_jax.errors import UserError
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import FAMILIES, spec_from_config
from sft_jax.model.options import Options
from sft_jax.model.quantise import quantise
from sft_jax.model.sharding import abstract_mesh, named_leaves, shardings

GOLDENS = Path(__file__).parents[1] / "goldens" / "layout"

# The layout must not depend on the mesh.
MESHES = {
    "one": {},
    "fsdp": dict(fsdp=8),
    "tensor": dict(fsdp=4, tensor=2),
    "all": dict(data=2, fsdp=2, expert=4, context=2, tensor=2),
}
# What `tensor` does not divide.
REFUSED = {
    "GemmaForCausalLM": r"attention\.key\.kernel .*: mesh.tensor=2 does not divide 1 kv_heads",
    "Gemma3ForCausalLM": r"attention\.key\.kernel .*: mesh.tensor=2 does not divide 1 kv_heads",
}


def mesh_of(sizes: dict[str, int]):
    return abstract_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, **sizes})


def abstract(architecture: str) -> Decoder:
    spec = spec_from_config(published_config(architecture))
    return jax.eval_shape(lambda: Decoder(spec, Options(), jax.random.key(0)))


def lines(decoder: Decoder, mesh) -> list[str]:
    placed = named_leaves(shardings(decoder, mesh))
    return [
        f"{path} {'x'.join(map(str, leaf.get_value().shape))} ({', '.join(map(str, place.get_value().spec))})"
        for (path, leaf), (_, place) in zip(named_leaves(decoder), placed, strict=True)
    ]


def golden_lines(name: str, decoder: Decoder) -> list[str]:
    golden = GOLDENS / f"{name}.txt"
    if os.environ.get("SFT_JAX_UPDATE_GOLDENS") == "1":
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text("\n".join(lines(decoder, mesh_of({}))) + "\n")
    return golden.read_text().splitlines()


def parameters_of(decoder: Decoder) -> int:
    """How many numbers its checkpoint has: without rows that only fill up a vocabulary."""
    filling = decoder.spec.vocab_rows - decoder.spec.vocab_size
    tables = [leaf for _, leaf in named_leaves(decoder) if "vocab" in leaf.axes]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(decoder)) - len(tables) * filling * decoder.spec.hidden_size


def test_every_architecture_has_a_golden():
    assert PUBLISHED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_layout(architecture):
    decoder = abstract(architecture)
    parameters = PUBLISHED[architecture][2]
    assert parameters in (None, parameters_of(decoder))
    expected = golden_lines(architecture, decoder)
    for name, sizes in MESHES.items():
        if architecture in REFUSED and sizes.get("tensor", 1) > 1:
            with pytest.raises(UserError, match=REFUSED[architecture]):
                lines(decoder, mesh_of(sizes))
        else:
            assert lines(decoder, mesh_of(sizes)) == expected, name


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_layout_of_a_quantised_base(architecture):
    """Codes and scales lie as the kernel does, whose parameters they stand for."""
    decoder = quantise(abstract(architecture), "nf4")
    expected = golden_lines(f"{architecture}.nf4", decoder)
    for name, sizes in MESHES.items():
        assert lines(decoder, mesh_of(sizes)) == expected, name
    variables = [leaf for _, leaf in named_leaves(decoder)]
    count = sum(math.prod(leaf.get_value().shape) * leaf.get_metadata().get("numbers", 1) for leaf in variables)
    assert count == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(architecture)))
