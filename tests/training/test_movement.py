"""The sampled ratio of an update is that of all numbers, on every layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import random_decoder

from sft_jax.config import OptimConfig
from sft_jax.model.options import Options
from sft_jax.model.sharding import constrain_fn, make_mesh, shardings
from sft_jax.training import movement
from sft_jax.training.movement import make_movement, spread
from sft_jax.training.optim import make_optimizer
from sft_jax.training.state import create_state


def norm(arrays) -> float:
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in arrays))


def exact(before, after) -> float:
    before, after = jax.tree.leaves(jax.device_get(before)), jax.tree.leaves(jax.device_get(after))
    return norm([np.asarray(b, np.float64) - np.asarray(a, np.float64) for a, b in zip(before, after, strict=True)]) / norm(before)


def moved(tree, seed: int, size: float):
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tree))))
    return jax.tree.map(lambda x: x + size * jax.random.normal(next(keys), x.shape, x.dtype), tree)


@pytest.mark.parametrize("layout", [{}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("frozen", [(), ({"pattern": r"^embed|attention\.", "freeze": True},)], ids=["all", "some"])
def test_it_is_the_ratio_of_the_trained_numbers(layout, frozen, monkeypatch):
    """With samples that hold all numbers, so nothing is estimated."""
    monkeypatch.setattr(movement, "SAMPLE", 50_000)
    mesh = make_mesh(**{"fsdp": 1, **layout}, devices=None if layout else jax.devices()[:1])
    decoder = random_decoder("llama", Options(constrain=constrain_fn(mesh)))
    optimizer = make_optimizer(OptimConfig(groups=frozen), nnx.state(decoder), 4)
    _, state = create_state(jax.device_put(decoder, shardings(decoder, mesh)), optimizer, mesh)
    after = moved(state.params, 1, 1e-3)
    np.testing.assert_allclose(make_movement(state.params, mesh)(state.params)(after), exact(state.params, after), rtol=1e-4)


def test_of_large_arrays_it_is_close():
    mesh = make_mesh(fsdp=4, tensor=2)
    shapes = {"a": ((3, 256, 512), ("layers", "embed", "mlp")), "b": ((1024, 256), ("vocab", "embed")), "c": ((3, 256), ("layers", "norm"))}
    before = nnx.State({name: nnx.Param(jax.random.normal(jax.random.key(0), shape), axes=axes) for name, (shape, axes) in shapes.items()})
    before = jax.device_put(before, shardings(before, mesh))
    after = moved(before, 1, 1e-3)
    # Rows of an embedding whose tokens did not occur stay as they are.
    after["b"] = after["b"].replace(jnp.where(jnp.arange(1024)[:, None] % 7 == 3, after["b"][...] + 0.02, before["b"][...]))
    np.testing.assert_allclose(make_movement(before, mesh)(before)(after), exact(before, after), rtol=0.05)


def test_nothing_moved_and_nothing_there():
    mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
    zeros = nnx.State({"b": nnx.Param(jnp.zeros((4, 4)), axes=("embed", "mlp"))})
    ones = nnx.State({"b": nnx.Param(jnp.ones((4, 4)), axes=("embed", "mlp"))})
    assert make_movement(ones, mesh)(ones)(ones) == 0 and make_movement(zeros, mesh)(zeros)(ones) == 0


@pytest.mark.parametrize(("shape", "count"), [((), 5), ((7,), 3), ((6, 8), 100), ((6, 8), 5), ((3, 100, 64), 64), ((2, 1, 4096), 512)])
def test_places_are_different_and_lie_in_all_parts(shape, count):
    places = np.stack(spread(shape, count)) if shape else np.zeros((0, 1))
    assert places.shape[1] == min(count, int(np.prod(shape)))
    if not shape:
        return
    assert len(np.unique(places, axis=1).T) == places.shape[1] and (places < np.array(shape)[:, None]).all()
    if np.prod(shape) > 4 * count:
        assert places[0].max() >= shape[0] // 2 and len(np.unique(places[-1])) > min(count, shape[-1]) / 2
