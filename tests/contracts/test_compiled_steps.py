"""What the compiled train step of every layout and family holds and sends, read from its program.

A step that forms the logits of all positions, gathers all layers at once or adds up gradients in 16 bits trains like any
other; only the program shows it.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from slow_values import slow
from tiny_models import ALL_CONFIGS, KINDS
from tiny_plans import tiny_config, write_model

from sft_jax.model.platform import tracing_for
from sft_jax.model.sharding import make_mesh
from sft_jax.planning import planner
from sft_jax.planning.collectives import Collective, collectives
from sft_jax.planning.hlo import Program
from sft_jax.planning.machines import machine
from sft_jax.planning.program import Programs, has_tpu_compiler, make_programs, mesh_of
from sft_jax.planning.whole_arrays import whole_arrays
from sft_jax.training.optimizers import OPTIMIZERS

needs_libtpu = pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed (pip install 'sft_jax[tpu]')")
LAYOUTS = {  # of eight devices
    "data2_fsdp2_context2": dict(data=2, fsdp=2, context=2), "fsdp8": dict(fsdp=8), "fsdp4_tensor2": dict(fsdp=4, tensor=2),
    "fsdp2_expert2_tensor2": dict(fsdp=2, expert=2, tensor=2),
}  # fmt: skip
QUICK = [("llama", "data2_fsdp2_context2"), ("qwen2_moe", "fsdp2_expert2_tensor2")]
EXPERTS = ("gpt_oss", "qwen2_moe", "deepseek_v3")
ALL = [(name, layout) for name in KINDS for layout in LAYOUTS if name in EXPERTS or "expert" not in layout]
VOCAB = 11 * 32  # no other size


def compiled(step, *arguments) -> tuple[str, list[Collective]]:
    """The text of a program for eight devices, and its collectives."""
    text = step.lower(*arguments).compile().as_text()
    return text, collectives(Program(text), 8, lambda loop: 1)


def programs_of(tmp_path, name: str, layout: dict[str, int], devices=None, micro: int = 16, **settings) -> Programs:
    """A family's step with rows of several chunks of the loss, on the CPU's devices or on those of a TPU that is not there."""
    sizes = {"max_position_embeddings": 512, "n_positions": 512}
    config = {**ALL_CONFIGS[name], "vocab_size": VOCAB}
    model = write_model(tmp_path / name, base={**config, **{key: size for key, size in sizes.items() if key in config}})
    mesh = {"fsdp": 1, **layout}
    config = tiny_config(
        model, train__batch_size=16, train__micro_batch_size=micro, **{f"mesh__{axis}": size for axis, size in mesh.items()}, **settings
    )
    mesh = make_mesh(**mesh) if devices is None else mesh_of(config, machine(devices), compiled=True)
    return make_programs(config, planner.base_of(config), mesh, lambda text: None)


@pytest.mark.parametrize(("name", "layout"), [*QUICK, *slow(*(case for case in ALL if case not in QUICK))])
def test_no_device_holds_what_none_should(tmp_path, name, layout):
    programs = programs_of(tmp_path, name, LAYOUTS[layout], model__compute_dtype="float32")
    text, found = compiled(programs.train_step, programs.state, programs.batch)
    assert any(one.kind == "all-gather" for one in found)
    assert not whole_arrays(text, found, planner.limits_of(programs, programs.batch))


@pytest.mark.parametrize(("name", "layout"), [QUICK[0], *slow(QUICK[1])])
def test_micro_batches_hold_no_more_than_one_does(tmp_path, name, layout):
    """With two of them the loop keeps sums of gradients and kernels in the compute dtype, each of them cut."""
    programs = programs_of(tmp_path, name, LAYOUTS[layout], micro=8, model__compute_dtype="float32")
    assert programs.batch.tokens.shape[:2] == (2, 8)
    assert not whole_arrays(*compiled(programs.train_step, programs.state, programs.batch), planner.limits_of(programs, programs.batch))


@pytest.mark.parametrize(("name", "layout"), [QUICK[1], *slow(QUICK[0])])
def test_no_device_holds_in_an_evaluation_what_none_should(tmp_path, name, layout):
    programs = programs_of(tmp_path, name, LAYOUTS[layout], model__compute_dtype="float32")
    text, found = compiled(programs.eval_step, programs.state, programs.eval_batch)
    assert any(one.kind == "all-gather" for one in found)
    assert not whole_arrays(text, found, planner.limits_of(programs, programs.eval_batch))


def test_a_wrong_layout_is_named_whatever_makes_it(tmp_path):
    """Kernels of all layers made whole before the step: by the compiler, by a gather of ours, and by a sum of parts among zeros."""
    programs = programs_of(tmp_path, "llama", LAYOUTS["fsdp8"], model__compute_dtype="float32")
    mesh, axis = programs.mesh, ("fsdp", "expert", "context")

    def by_gather(part):
        return jax.lax.all_gather(part, axis, axis=1, tiled=True)

    def by_sum(part):
        whole = jnp.zeros((part.shape[0], part.shape[1] * 8, part.shape[2]), part.dtype)
        return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(whole, part, jax.lax.axis_index(axis) * part.shape[1], 1), axis)

    def over_devices(function):
        return jax.shard_map(function, mesh=mesh, in_specs=P(None, axis), out_specs=P(), check_vma=False)

    ways = {
        "gate": lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())), "up": over_devices(by_gather),
        "query": over_devices(by_sum),
    }  # fmt: skip

    def wrong(state, batch):
        def changed(path, leaf):
            way = next((way for name, way in ways.items() if f"'{name}'" in jax.tree_util.keystr(path) and leaf.ndim == 3), None)
            return leaf if way is None else way(leaf)

        return programs.train_step(state._replace(params=jax.tree_util.tree_map_with_path(changed, state.params)), batch)

    told = whole_arrays(*compiled(jax.jit(wrong), programs.state, programs.batch), planner.limits_of(programs, programs.batch))
    layers, hidden = len(programs.composed.abstract.spec.layers), programs.composed.abstract.spec.hidden_size
    inner = ALL_CONFIGS["llama"]["intermediate_size"]
    assert sum(line.startswith("more than one layer is gathered at once") and f"[{layers},{hidden},{inner}]" in line for line in told) >= 2, told
    assert any("shard_map/all_gather" in line for line in told), told
    assert any(line.startswith("more than one layer is added up at once") and f"[{layers},{hidden}," in line for line in told), told


@pytest.mark.parametrize("name", ["muon", *slow(*(name for name in OPTIMIZERS if name != "muon"))])
def test_no_optimizer_holds_what_none_should(tmp_path, name):
    """Its update is a part of the step: one that multiplies matrices gathers them, no more than one layer of them at once."""
    programs = programs_of(tmp_path, "llama", LAYOUTS["fsdp8"], model__compute_dtype="float32", optim__name=name)
    text, found = compiled(programs.train_step, programs.state, programs.batch)
    gathered = [one for one in found if one.kind == "all-gather" and "cond" in one.operation]
    assert bool(gathered) == (name == "muon")
    assert not whole_arrays(text, found, planner.limits_of(programs, programs.batch))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "settings"),
    [
        ("llama", "fsdp4_tensor2", {}), ("llama", "data2_fsdp2_context2", {"model__dtype": "bfloat16"}),
        ("gemma2", "fsdp8", {"adapter__name": "lora", "adapter__targets": [".*"], "model__dtype": "bfloat16"}),
        ("qwen2_moe", "fsdp2_expert2_tensor2", {"model__dtype": "bfloat16"}), ("gpt_oss", "fsdp8", {}),
        ("deepseek_v3", "fsdp4_tensor2", {}), ("llama", "fsdp8", {"train__qat": "int8"}),
    ],
    ids=str,
)  # fmt: skip
def test_gradients_are_summed_over_devices_in_float32(tmp_path, name, layout, settings):
    """Of the compute dtype are sums of hidden states alone: of products cut over `tensor`, of keys and values over `context`."""
    with tracing_for("tpu"):
        programs = programs_of(tmp_path, name, LAYOUTS[layout], "v5e-8", **settings)
        text, found = compiled(programs.train_step, programs.state, programs.batch)
    limits = planner.limits_of(programs, programs.batch)
    assert not whole_arrays(text, found, limits)
    sums = [one for one in found if one.kind in ("all-reduce", "reduce-scatter")]
    tensor = programs.mesh.shape["tensor"]
    assert any(one.dtype == "f32" and one.devices > tensor for one in sums)
    # The compiler gathers a vector as a sum of parts among zeros, of no operation, which rounds nothing.
    rounded = [one for one in sums if one.dtype == "bf16" and (one.operation or one.elements > limits.hidden)]
    along = {programs.mesh.shape[name] for name in ("tensor", "context")} - {1}
    assert all(one.devices in along and one.elements > max(limits.head, limits.kernel) for one in rounded), rounded


@needs_libtpu
@pytest.mark.slow
def test_what_is_offloaded_lies_in_the_memory_of_the_host(tmp_path):
    """The inputs of all layers, which no device keeps; S(5) is the space of the host's pinned memory."""
    held = {}
    with tracing_for("tpu"):
        for remat in ("full", "offload"):
            programs = programs_of(tmp_path, "llama", LAYOUTS["fsdp8"], "v5e-8", model__remat=remat)
            text, _ = compiled(programs.train_step, programs.state, programs.batch)
            spec, (_, rows, length) = programs.composed.abstract.spec, programs.batch.tokens.sharding.shard_shape(programs.batch.tokens.shape)
            inputs = rf"bf16\[{len(spec.layers)},{rows},{length},{spec.hidden_size}\]\{{[^}}]*\}}"
            held[remat] = set(re.findall(inputs, text))
    assert held["full"] and not any("S(5)" in layout for layout in held["full"])
    assert held["offload"] and all("S(5)" in layout for layout in held["offload"])
