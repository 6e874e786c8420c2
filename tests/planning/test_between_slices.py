"""What several slices of TPUs send each other, read from programs that are compiled for them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_plans import tiny_config, write_model

from sft_jax.config import ModelConfig
from sft_jax.model.sharding import make_mesh
from sft_jax.planning import planner
from sft_jax.planning.between_slices import between_slices
from sft_jax.planning.hlo import Program
from sft_jax.planning.machines import CHIPS, machine
from sft_jax.planning.program import has_tpu_compiler, tpu_devices
from sft_jax.planning.report import network_bytes
from sft_jax.planning.roofline import roofline

pytestmark = pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed (pip install 'sft_jax[tpu]')")

SHAPE = 1024, 2048  # of float32 numbers, 8 MiB


@pytest.mark.parametrize(
    ("kind", "given", "wanted", "moved"),
    [
        ("all-gather", P("data"), P(), 6 << 20),  # three slices have three quarters
        ("all-to-all", P("data"), P(None, "data"), 3 << 19),  # of a slice's quarter three quarters go elsewhere
        ("all-reduce", P(None, "data"), P(None), 6 << 10),  # of 1024 sums in 4 KiB three quarters, there and back
    ],
)
def test_bytes_by_hand(kind, given, wanted, moved):
    """Of four slices, whose devices hold the same within each. The sum of rows is an array of one axis."""
    slices = machine("4xv5e-4")
    mesh = make_mesh(data=4, fsdp=4, expert=1, context=1, tensor=1, devices=tpu_devices(slices))
    compute = (lambda x: x.sum(1)) if kind == "all-reduce" else (lambda x: 2 * x)
    step = jax.jit(compute, in_shardings=NamedSharding(mesh, given), out_shardings=NamedSharding(mesh, wanted))
    program = Program(step.lower(jax.ShapeDtypeStruct(SHAPE, jnp.float32)).compile().as_text())
    (found,) = between_slices(program, program.executions(lambda loop: 1))
    assert (found.kind, found.bytes, found.nodes, found.times, found.overlapped) == (kind, moved, 4, 1, False)
    assert found.across == moved  # over the network, and nothing over links
    exposed = roofline(slices, ModelConfig(), 0.0, 0.0, [found]).exposed
    assert exposed == pytest.approx(moved / CHIPS["v5e"].outside)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data", "fsdp"), [("2xv5e-4", 2, 4), ("4xv5e-4", 1, 16)])
def test_a_plan_over_slices(tmp_path, name, data, fsdp):
    """Compiled and estimated plans agree on what the network carries: the sum of each gradient, and kernels where fsdp crosses it."""
    model = write_model(tmp_path / "model", hidden_size=2048, intermediate_size=2048, num_attention_heads=32, num_key_value_heads=16)
    config = tiny_config(model, train__batch_size=32, train__micro_batch_size=16, mesh__data=data, mesh__fsdp=fsdp)
    compiled, estimated = (
        planner.make_plan(config, machine(name), planner.base_of(config), tokens=1e6, estimated=way, log=lambda text: None, plain=True)
        for way in (False, True)
    )
    # Of so few tokens a device has fewer than are a chunk of the loss, so their logits are those of all positions.
    assert compiled.fits and not [line for line in compiled.whole if not line.startswith("logits")]
    assert network_bytes(estimated) == pytest.approx(network_bytes(compiled), rel=0.25)
    gathered = {one.nodes for one in compiled.train.collectives if one.kind == "all-gather" and one.total > 1e6}
    assert (gathered == {1}) == (data == machine(name).slices)
    if data == machine(name).slices:
        assert estimated.needed == pytest.approx(compiled.needed, rel=0.1)
