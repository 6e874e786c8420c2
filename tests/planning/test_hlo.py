"""Collectives and loops of compiled programs, against programs in which they can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.model.sharding import make_mesh
from sft_jax.planning.collectives import collectives
from sft_jax.planning.hlo import Program, array_bytes
from sft_jax.planning.machines import machine
from sft_jax.planning.program import has_tpu_compiler, tpu_devices

DEVICES = 8


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, DEVICES, 1)


def of(f, mesh, specs, out, *shapes, trips=lambda loop: 1):
    """The collectives of f on arrays of these shapes laid out by `specs`."""
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p)) for s, p in zip(shapes, specs, strict=True)]
    compiled = jax.jit(f, out_shardings=NamedSharding(mesh, out)).lower(*args).compile()
    return collectives(Program(compiled.as_text()), DEVICES, trips)


def test_a_gather(mesh):
    [one] = of(lambda x: x + 1, mesh, [P("fsdp")], P(), (64, 16))
    assert (one.kind, one.devices, one.largest, one.times) == ("all-gather", DEVICES, 64 * 16 * 4, 1)
    assert one.bytes == 64 * 16 * 4 * 7 / 8


def test_a_sum(mesh):
    [one] = of(lambda x: x.sum(0), mesh, [P("fsdp")], P(), (64, 16))
    assert (one.kind, one.bytes) == ("all-reduce", 2 * 16 * 4 * 7 / 8)  # a scatter and a gather


def test_scans_count_their_steps(mesh):
    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    found = of(layers, mesh, [P("fsdp"), P(None, "fsdp")], P("fsdp"), (16, 32), (5, 32, 32))
    gathers = [one for one in found if one.kind == "all-gather"]
    assert gathers and all(one.times == 5 for one in gathers)
    assert {one.largest for one in gathers} == {32 * 32 * 4}


def test_loops_of_unknown_length_run_as_often_as_is_assumed(mesh):
    def loop(x, n):
        def body(i, x):
            return jax.lax.with_sharding_constraint(x.sum(0, keepdims=True) + x, NamedSharding(mesh, P("fsdp")))

        return jax.lax.fori_loop(0, n[0].astype(jnp.int32), body, x)

    assert [one.times for one in of(loop, mesh, [P("fsdp"), P()], P("fsdp"), (16, 4), (1,), trips=lambda loop: 7)] == [7]


def test_types():
    assert array_bytes("(bf16[4,8]{1,0:T(8,128)}, f32[], pred[3], u8[2,2])") == [64, 4, 3, 4]


def test_texts_of_tpu_programs():
    """A collective that a schedule has cut into pieces counts once, as overlapped; groups are written in several ways."""
    text = """
%piece.1 (p: bf16[2,8]) -> (bf16[8,8], u32[]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %start = (bf16[8,8]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%body (state: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %state = (s32[], bf16[8,8]) parameter(0)
  %x = bf16[2,8]{1,0} get-tuple-element(%state), index=1
  %fusion.1 = (bf16[8,8]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%piece.1
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%x), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  %collective-permute-start.1 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %all-reduce.1 = f32[16]{0} all-reduce(%y), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %next = (s32[], bf16[8,8]) tuple(%i, %all-gather.2)
}

%condition (state.1: (s32[], bf16[8,8])) -> pred[] {
  %state.1 = (s32[], bf16[8,8]) parameter(0)
  %constant.1 = s32[]{:T(128)} constant(6)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %constant.1), direction=LT
}

ENTRY %main (a: bf16[2,8]) -> bf16[8,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %init = (s32[], bf16[8,8]) tuple(%zero, %a)
  %while.1 = (s32[], bf16[8,8]) while(%init), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %out = bf16[8,8]{1,0} get-tuple-element(%while.1), index=1
}
"""
    gather, reduce, permute = sorted(collectives(Program(text), DEVICES, lambda loop: 1), key=lambda one: one.kind)
    assert (permute.overlapped, permute.times, permute.bytes) == (True, 6, 128)
    assert (gather.kind, gather.overlapped, gather.times, gather.devices, gather.bytes) == ("all-gather", True, 6, 4, 128 * 3 / 4)
    assert (reduce.kind, reduce.overlapped, reduce.times, reduce.devices, reduce.bytes) == ("all-reduce", False, 6, 4, 2 * 64 * 3 / 4)


def test_passes_that_are_taken_out_of_a_loop_count_beside_it():
    """One of seven is made before the loop, with the channel of the six inside; a piece in a loop inside of that is none."""
    text = """
%begin (p: bf16[2,8]) -> (bf16[8,8], u32[]) {
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %start = (bf16[8,8]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (q: bf16[2,8]) -> bf16[8,8] {
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%q), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %step = bf16[8,8]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveStep"
}

%inside (a: bf16[8,8]) -> bf16[8,8] {
  ROOT %fusion.2 = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
}

%body (state: bf16[8,8]) -> bf16[8,8] {
  %fusion.1 = (bf16[8,8]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%begin
  ROOT %while.2 = bf16[8,8] while(%fusion.1), condition=%condition, body=%inside, backend_config={"known_trip_count":{"n":"4"}}
}

%condition (state.1: bf16[8,8]) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (b: bf16[2,8]) -> bf16[8,8] {
  %all-gather.3 = bf16[8,8]{1,0} all-gather(%b), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %while.1 = bf16[8,8] while(%all-gather.3), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""
    found = collectives(Program(text), DEVICES, lambda loop: 1)
    assert sorted((one.times, one.overlapped) for one in found) == [(1, False), (6, True)]


def test_collectives_of_one_channel_are_told_apart():
    """Those of all shard_maps have the channel 1."""
    text = """
ENTRY %main (a: bf16[2,8]) -> bf16[8,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %all_to_all.1 = bf16[2,8]{1,0} all-to-all(%a), channel_id=1, replica_groups={{0,1}}, dimensions={0}, metadata={op_name="jit(f)/all_to_all"}
  %reduce_scatter.1 = f32[1,8]{1,0} reduce-scatter(%b), channel_id=1, replica_groups={{0,1}}, dimensions={0}, metadata={op_name="jit(f)/reduce_scatter"}
  %reduce_scatter.2 = f32[1,8]{1,0} reduce-scatter(%c), channel_id=1, replica_groups={{0,1}}, dimensions={0}, metadata={op_name="jit(f)/reduce_scatter"}
  ROOT %out = bf16[8,8]{1,0} custom-call(%a), custom_call_target="x"
}
"""
    found = collectives(Program(text), DEVICES, lambda loop: 1)
    assert sorted((one.kind, one.bytes) for one in found) == [("all-to-all", 16), ("reduce-scatter", 32), ("reduce-scatter", 32)]


@pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed (pip install 'sft_jax[tpu]')")
@pytest.mark.parametrize(("name", "kind", "times"), [("v5e-8", "reduce-scatter", 1), ("v5e-16", "all-reduce", 2)])
def test_what_the_compiler_makes_of_a_reduce_scatter(name, kind, times):
    """Over both axes of a larger slice libtpu sums whole arrays, twice the bytes; there is no reduce-scatter that is not seen.

    Where a libtpu no longer does, so must the estimate not (`_SCATTERED`).
    """
    devices = tpu_devices(machine(name))
    mesh, count = make_mesh(1, len(devices), 1, devices), len(devices)
    scatter = jax.shard_map(lambda x: jax.lax.psum_scatter(x[0], "fsdp", tiled=True), mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    arguments = jax.ShapeDtypeStruct((count, 4096, 1024), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    text = jax.jit(scatter).lower(arguments).compile().as_text()
    [one] = collectives(Program(text), count, lambda loop: 1)
    assert (one.kind, one.devices, one.bytes) == (kind, count, times * 4096 * 1024 * 4 * (count - 1) / count)
    assert ("reduce-scatter" in text) == (kind == "reduce-scatter")
