"""Collectives of several nodes of GPUs or slices of TPUs: what goes over links, what over the network, and what a search makes of it."""

import pytest
from tiny_plans import tiny_config, write_model

from sft_jax.config import ModelConfig
from sft_jax.errors import UserError
from sft_jax.planning import planner
from sft_jax.planning.collectives import Collective
from sft_jax.planning.machines import machine
from sft_jax.planning.roofline import roofline
from sft_jax.planning.search import over_copies, search

WHOLE = 16e9  # bytes of the array that devices gather, sum or exchange


def plan(tmp_path, name, rows=16, **settings):
    model = write_model(tmp_path / "model", hidden_size=384, num_key_value_heads=8, num_attention_heads=8)
    config = tiny_config(model, train__batch_size=rows, train__micro_batch_size=rows, train__max_replicated=1.0, **settings)
    return planner.make_plan(config, machine(name), planner.base_of(config), estimated=True, log=lambda text: None)


def nodes_of(found) -> dict[tuple[str, str], tuple[int, int]]:
    """Returns devices and nodes of each kind of collective."""
    return {(one.kind, one.operation): (one.devices, one.nodes) for one in found.train.collectives}


@pytest.mark.parametrize(
    ("kind", "devices", "nodes", "seconds"),
    [
        ("all-gather", 8, 1, 14e9 / 450e9),  # 7/8 of the array comes over NVLink
        ("reduce-scatter", 8, 1, 14e9 / 450e9),
        ("all-reduce", 8, 1, 28e9 / 450e9),
        ("all-to-all", 8, 1, 14e9 / 450e9),
        ("all-gather", 16, 2, 14e9 / 450e9),  # the network brings half of the array to eight cards: 8e9 / 400e9 is less
        ("reduce-scatter", 128, 16, 15e9 / 400e9),  # now it brings 15/16 of it, which takes longer than NVLink
        ("all-reduce", 128, 16, 30e9 / 400e9),
        ("all-gather", 4, 2, 8e9 / 100e9),  # two of each node, with the cards of two
        ("all-reduce", 2, 2, 16e9 / 50e9),  # one of each node: the other seven sum up something else
        ("all-to-all", 16, 2, 8e9 / 50e9),  # nothing that the devices of a node could share
    ],
)
def test_seconds_by_hand(kind, devices, nodes, seconds):
    """Of an H100: 450 GB/s of NVLink, and a card of 50 GB/s, of which a node has eight."""
    moved = (2 if kind == "all-reduce" else 1) * WHOLE * (devices - 1) / devices
    one = Collective(kind, moved, 3.0, False, devices, int(WHOLE), int(WHOLE / 2), "", nodes=nodes)
    assert roofline(machine(f"h100x{devices}"), ModelConfig(), 0.0, 0.0, [one]).exposed == pytest.approx(3 * seconds)


def test_fsdp_over_two_nodes(tmp_path):
    found = nodes_of(plan(tmp_path, "h100x16", mesh__fsdp=16))
    assert found["all-gather", "kernels"] == found["reduce-scatter", "gradients"] == (16, 2)


@pytest.mark.parametrize("name", ["h100x16", "2xv5e-8"])
def test_copies_on_two_nodes_gather_inside(tmp_path, name):
    """Hybrid sharding: kernels never leave the node or slice, only the sum of the gradients' parts does."""
    found = plan(tmp_path, name, mesh__data=2, mesh__fsdp=8)
    nodes = nodes_of(found)
    assert nodes["all-gather", "kernels"] == nodes["reduce-scatter", "gradients"] == (8, 1)
    assert nodes["all-reduce", "gradients"] == (2, 2)
    summed = next(one for one in found.train.collectives if one.kind == "all-reduce")
    assert (summed.inside, summed.across) == (0.0, pytest.approx(found.held.gradients))  # there and back: twice half of a part


def test_tensor_stays_inside(tmp_path):
    found = nodes_of(plan(tmp_path, "h100x16", mesh__fsdp=2, mesh__tensor=8))
    assert found["all-reduce", "states between layers"] == (8, 1)
    assert found["all-gather", "kernels"] == (2, 2)


def test_nodes_lie_where_the_run_lays_them(tmp_path):
    """Three nodes do not divide data=4, so they lie along fsdp, and copies of a part are in one node."""
    found = nodes_of(plan(tmp_path, "h100x24", mesh__data=4, mesh__fsdp=6, rows=24))
    assert found["all-reduce", "gradients"] == (4, 1) and found["all-gather", "kernels"] == (6, 3)


def test_tensor_over_nodes_is_refused_as_in_the_run(tmp_path):
    with pytest.raises(UserError, match=r"mesh\.tensor=16: 2 slices or nodes are joined by a network.*make mesh\.data a multiple of 2"):
        plan(tmp_path, "h100x16", mesh__tensor=16, mesh__fsdp=1)


def test_one_node_is_counted_by_its_links(tmp_path):
    found = plan(tmp_path, "h100x8", mesh__data=2, mesh__fsdp=4)
    assert {one.nodes for one in found.train.collectives} == {1}
    moved = [sum(one.total for one in found.train.collectives if one.overlapped is hidden) for hidden in (True, False)]
    assert [found.roofline.overlapped, found.roofline.exposed] == pytest.approx([size / 450e9 for size in moved])


def test_two_nodes_are_no_slower_than_one(tmp_path):
    """Of the same batch, with whatever a search finds."""
    model = write_model(tmp_path / "model", hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8)
    config = tiny_config(model, data__max_length=4096, train__batch_size=32, train__micro_batch_size=32)
    best = {}
    for name in ("h100x8", "h100x16"):
        best[name] = search(config, machine(name), planner.base_of(config), tokens=1e8, estimated=True, log=lambda text: None)[0]
    assert best["h100x16"].roofline.seconds <= best["h100x8"].roofline.seconds


def test_a_search_tries_a_copy_a_node():
    layout = {"data": 1, "fsdp": 32, "expert": 1, "context": 1, "tensor": 1}
    assert [(mesh["data"], mesh["fsdp"]) for mesh in over_copies(layout, nodes=4)] == [(2, 16), (4, 8), (32, 1)]
    assert [(mesh["data"], mesh["fsdp"]) for mesh in over_copies(layout, nodes=1)] == [(2, 16), (32, 1)]
