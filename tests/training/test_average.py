"""The average of the parameters against a recomputation from the parameters of every step, and where a run uses it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_batches import random_batch
from tiny_models import random_decoder
from tiny_run import final_checksums, metrics, tiny_config

import sft_jax
from sft_jax import fit
from sft_jax.checkpoint.checkpoints import flatten_state, read_manifest, restore
from sft_jax.config import OptimConfig
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.model.options import Options
from sft_jax.model.sharding import constrain_fn, make_mesh
from sft_jax.training.optim import make_optimizer
from sft_jax.training.state import abstract_state, create_state
from sft_jax.training.step import make_train_step, place_batch

DECAY = 0.8
CONFIG = OptimConfig(learning_rate=0.03, schedule="constant", warmup=0.0, ema=DECAY, groups=({"pattern": "embed", "freeze": True},))


def recomputed(params: list[np.ndarray], decay: float = DECAY) -> np.ndarray:
    """The mean of the parameters after each update, weighted by decay^age, in float64."""
    weights = np.array([decay ** (len(params) - 1 - number) for number in range(len(params))])
    return np.tensordot(weights / weights.sum(), np.asarray(params, np.float64), axes=1)


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def micro(seed: int, weights: str = "uneven"):
    return jax.tree.map(lambda x: x[None], random_batch(8, 16, seed=seed, weights=weights))


@functools.cache
def compiled(dtype, mesh):
    mesh = mesh and make_mesh(*mesh)
    decoder = random_decoder("llama", Options() if mesh is None else Options(constrain=constrain_fn(mesh)))
    decoder = jax.tree.map(lambda x: x.astype(dtype), decoder)
    optimizer = make_optimizer(CONFIG, nnx.state(decoder), 9)
    graphdef, state = create_state(decoder, optimizer, mesh)
    _, expected = abstract_state(decoder, optimizer, mesh)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype) and (mesh is None or x.sharding == y.sharding)
    return state, make_train_step(graphdef, optimizer, mesh), mesh


def start(dtype, mesh):
    """A new state, which the step may overwrite."""
    state, step, mesh = compiled(dtype, mesh)
    return jax.tree.map(jnp.copy, state), step, mesh


@pytest.mark.parametrize("dtype, mesh", [("float32", None), ("bfloat16", (2, 2, 2))])
def test_the_average_is_the_weighted_mean_of_the_parameters_of_every_step(dtype, mesh):
    state, step, mesh = start(dtype, mesh)
    assert {x.dtype for x in jax.tree.leaves(state.average)} == {jnp.dtype("float32")}
    assert jax.tree.structure(state.average) == jax.tree.structure(state.params) and jax.tree.leaves(state.frozen)
    for a, p in zip(leaves(state.average), leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, p)  # before the first update
    history = []
    for seed in range(5):
        state, _ = step(state, place_batch(micro(seed), mesh, batch_dim=1))
        history.append(leaves(state.params))
        for a, *p in zip(leaves(state.average), *history, strict=True):
            np.testing.assert_allclose(a, recomputed(p), rtol=1e-6, atol=1e-6)
        if mesh is not None:
            same = jax.tree.map(lambda a, p: a.sharding.is_equivalent_to(p.sharding, p.ndim), state.average, state.params)
            assert all(jax.tree.leaves(same))
    averaged = state.averaged
    assert jax.tree.leaves(averaged.params)[0] is jax.tree.leaves(state.average)[0] and not averaged.average


def test_a_step_that_does_not_count_leaves_the_average():
    state, step, _ = start("float32", None)
    state, _ = step(state, micro(0))
    before = [x.tobytes() for x in leaves(state.average)]
    bad = micro(1)
    bad.weights[0, -1, 3] = np.inf
    for batch, name in ((bad, "nonfinite"), (micro(2, weights="none"), "empty")):
        state, found = step(state, batch)
        assert found[name] == 1 and [x.tobytes() for x in leaves(state.average)] == before
    history = [leaves(state.params)]
    state, _ = step(state, micro(3))
    history.append(leaves(state.params))
    for a, *p in zip(leaves(state.average), *history, strict=True):
        np.testing.assert_allclose(a, recomputed(p), rtol=1e-6, atol=1e-6)  # as if the others had not been


def test_without_a_decay_there_is_no_average():
    decoder = random_decoder("llama")
    optimizer = make_optimizer(dataclasses.replace(CONFIG, ema=0.0), nnx.state(decoder), 9)
    _, state = create_state(jax.tree.map(jnp.copy, decoder), optimizer)
    assert not jax.tree.leaves(state.average) and state.averaged is state


# ---- in a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("average")


def config_of(folder, **changes):
    held_out = {"data__eval": {"held": str(folder / "held_out.jsonl")}, "eval__every": 5}
    own = {"train__steps": 6, "optim__ema": DECAY, "checkpoint__every": 1, "checkpoint__keep": 9}
    return tiny_config(folder, **{**held_out, **own, **changes})


@pytest.fixture(scope="module")
def run(folder):
    summary = fit(config_of(folder, train__export=True), folder / "run")
    return summary, folder / "run"


def arrays(workdir, step: int) -> dict[str, np.ndarray]:
    place = workdir / "checkpoints" / str(step)
    written = read_manifest(place)["arrays"]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return restore(place, {name: jax.ShapeDtypeStruct(shape, dtype, sharding=device) for name, (shape, dtype, _) in written.items()})


@pytest.mark.slow
def test_the_average_in_checkpoints_is_what_is_loaded_and_exported(run):
    _, workdir = run
    steps = [arrays(workdir, step) for step in range(1, 7)]
    loaded, exported = (flatten_state({"params": nnx.state(sft_jax.load(path)[0])}) for path in (workdir, workdir / "export"))
    names = [name for name in steps[-1] if name.startswith("params/")]
    assert len(names) == len(loaded) == len(exported)
    for name in names:
        average = np.asarray(steps[-1][name.replace("params", "average", 1)])
        np.testing.assert_allclose(average, recomputed([np.asarray(step[name]) for step in steps]), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(loaded[name], average)
        np.testing.assert_array_equal(exported[name], average)
        assert (average != np.asarray(steps[-1][name])).any()


def test_evaluation_is_of_the_average(folder, run):
    """A run that begins from this one evaluates, before its first step, what this one evaluated at its end."""
    summary, workdir = run
    held_out = {"data__eval": {"held": str(folder / "held_out.jsonl")}}
    again = fit(tiny_config(folder, model__path=str(workdir), model__init="checkpoint", train__steps=1, **held_out), folder / "from_run")
    assert again["eval_first"]["held"]["loss"] == pytest.approx(summary["eval_last"]["held"]["loss"], rel=1e-6)
    plain = fit(config_of(folder, optim__ema=0.0), folder / "plain")
    assert plain["eval_first"] == summary["eval_first"]
    assert plain["eval_last"]["held"]["loss"] != pytest.approx(summary["eval_last"]["held"]["loss"], rel=1e-3)
    trained = [[record for record in metrics(place) if record["split"] == "train"] for place in (workdir, folder / "plain")]
    assert trained[0] == trained[1]  # the average changes nothing of the training


@pytest.mark.slow
def test_a_stopped_run_continues_bitwise(folder, run):
    _, workdir = run
    for steps in (2, 1):
        with pytest.raises(StoppedBySignal):
            fit(config_of(folder, train__stop_after_steps=steps), folder / "stopped")
    fit(config_of(folder), folder / "stopped")
    assert final_checksums(folder / "stopped") == final_checksums(workdir)
    assert metrics(folder / "stopped") == metrics(workdir)
    assert any(name.startswith("average/") for name in final_checksums(workdir)["arrays"])


def test_a_run_cannot_end_its_average(folder, run):
    with pytest.raises(UserError, match="optim.ema: was 0.8 when this run began and is 0.0 now"):
        fit(config_of(folder, optim__ema=0.0, train__steps=7), run[1])
