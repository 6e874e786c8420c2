"""What the compiled train step of every layout and family holds and sends, read from its program.

A step that forms the logits of all positions, gathers all layers at once or adds up gradients in 16 bits trains like any
other; only the program shows it.
"""

import re

import pytest
from slow_values import slow
from tiny_models import ALL_CONFIGS, KINDS
from tiny_plans import tiny_config, write_model

from sft_jax.model.platform import tracing_for
from sft_jax.model.sharding import make_mesh
from sft_jax.planning import planner
from sft_jax.planning.collectives import collectives
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


def programs_of(tmp_path, name: str, layout: dict[str, int], devices=None, **settings) -> Programs:
    """A family's step with rows of several chunks of the loss, on the CPU's devices or on those of a TPU that is not there."""
    sizes = {"max_position_embeddings": 512, "n_positions": 512}
    config = {**ALL_CONFIGS[name], "vocab_size": VOCAB}
    model = write_model(tmp_path / name, base={**config, **{key: size for key, size in sizes.items() if key in config}})
    mesh = {"fsdp": 1, **layout}
    config = tiny_config(
        model, train__batch_size=16, train__micro_batch_size=16, **{f"mesh__{axis}": size for axis, size in mesh.items()}, **settings
    )
    mesh = make_mesh(**mesh) if devices is None else mesh_of(config, machine(devices), compiled=True)
    return make_programs(config, planner.base_of(config), mesh, lambda text: None)


@pytest.mark.parametrize(("name", "layout"), [*QUICK, *slow(*(case for case in ALL if case not in QUICK))])
def test_no_device_holds_what_none_should(tmp_path, name, layout):
    programs = programs_of(tmp_path, name, LAYOUTS[layout], model__compute_dtype="float32")
    text = programs.train_step.lower(programs.state, programs.batch).compile().as_text()
    found = collectives(Program(text), 8, lambda loop: 1)
    assert any(one.kind == "all-gather" for one in found)
    assert not whole_arrays(text, found, planner.limits_of(programs))


@pytest.mark.parametrize("name", ["muon", *slow(*(name for name in OPTIMIZERS if name != "muon"))])
def test_no_optimizer_holds_what_none_should(tmp_path, name):
    """Its update is a part of the step: one that multiplies matrices gathers them, no more than one layer of them at once."""
    programs = programs_of(tmp_path, "llama", LAYOUTS["fsdp8"], model__compute_dtype="float32", optim__name=name)
    text = programs.train_step.lower(programs.state, programs.batch).compile().as_text()
    found = collectives(Program(text), 8, lambda loop: 1)
    gathered = [one for one in found if one.kind == "all-gather" and "cond" in one.operation]
    assert bool(gathered) == (name == "muon")
    assert not whole_arrays(text, found, planner.limits_of(programs))


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
        text = programs.train_step.lower(programs.state, programs.batch).compile().as_text()
    found = collectives(Program(text), 8, lambda loop: 1)
    limits = planner.limits_of(programs)
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
            compiled = programs.train_step.lower(programs.state, programs.batch).compile()
            spec, (_, rows, length) = programs.composed.abstract.spec, programs.batch.tokens.sharding.shard_shape(programs.batch.tokens.shape)
            inputs = rf"bf16\[{len(spec.layers)},{rows},{length},{spec.hidden_size}\]\{{[^}}]*\}}"
            held[remat] = set(re.findall(inputs, compiled.as_text()))
    assert held["full"] and not any("S(5)" in layout for layout in held["full"])
    assert held["offload"] and all("S(5)" in layout for layout in held["offload"])
