"""Runs that train adapters: the same step, loop and checkpoints; the base is left alone and known again."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapted import adapted
from flax import nnx
from jax.extend.core import jaxprs_in_params
from random_batches import random_batch
from tiny_models import random_decoder
from tiny_run import final_checksums, make_base, metrics, tiny_config

import sft_jax
from sft_jax import fit
from sft_jax.config import OptimConfig
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.hf.load import load_decoder, load_model_tokenizer
from sft_jax.model.adapters import adaptable, is_adapter, kernel_of
from sft_jax.model.attach import merge
from sft_jax.model.loss import next_token_loss
from sft_jax.model.options import Options
from sft_jax.model.sharding import named_leaves
from sft_jax.training import run as run_lib
from sft_jax.training.optim import make_optimizer
from sft_jax.training.state import abstract_state, create_state
from sft_jax.training.step import make_train_step

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
ADAPTER = dict(adapter__name="lora", adapter__rank=4, adapter__alpha=8.0, adapter__train=["final_norm"], adapter__tokens=[5, 6])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data of tiny runs and "base", a model that has weights."""
    folder = tmp_path_factory.mktemp("adapter_runs")
    make_base(folder)
    return folder


def config(folder, **changes):
    given = dict(model__path=str(folder / "base"), model__init="checkpoint", adapter__dropout=0.1, train__steps=5, train__export=True)
    return tiny_config(folder, **ADAPTER | given | dict(data__eval={"held": str(folder / "held_out.jsonl")}) | changes)


@pytest.fixture(scope="module")
def finished(folder):
    return fit(config(folder), folder / "finished"), folder / "finished"


def test_checkpoints_hold_no_base(finished):
    summary, workdir = finished
    arrays = final_checksums(workdir)["arrays"]
    params = {name.removeprefix("params/").replace("/", ".") for name in arrays if name.startswith("params/")}
    assert all(is_adapter(path) or path == "final_norm.scale" for path in params) and len(params) == 16
    assert not any(name.startswith("frozen/") for name in arrays)
    moments = {name for name in arrays if name.startswith("opt_state/mu/")}
    assert {name.removeprefix("opt_state/mu/").replace("/", ".") for name in moments} == params
    assert summary["eval_last"]["held"]["loss"] < summary["eval_first"]["held"]["loss"] - 0.1


def test_a_run_is_its_base_with_its_adapters(folder, finished):
    """What `load` gives has the loss that the run has told, generates, and merged is the same model."""
    summary, workdir = finished
    model, tokenizer = sft_jax.load(workdir)
    again = fit(config(folder, model__path=str(workdir), train__steps=1, train__export=False), folder / "from_run")
    assert again["eval_first"]["held"]["loss"] == pytest.approx(summary["eval_last"]["held"]["loss"], rel=1e-5)
    np.testing.assert_allclose(model(TOKENS), merge(model)(TOKENS), atol=1e-5)
    attached, merged = (sft_jax.generate(m, tokenizer, ["lamp", "rain at noon"], max_new_tokens=4) for m in (model, merge(model)))
    assert attached == merged


@pytest.mark.slow
def test_what_an_adapter_brings_and_a_group_freezes_is_kept(folder, finished):
    """A norm of the adapter that is gone on with, not of the base: in checkpoints, in going on and in loading."""
    decided = dict(adapter__rank=16, adapter__alpha=32.0, adapter__train=None, adapter__tokens=None)
    wanted = config(folder, **decided, adapter__path=str(finished[1]), optim__groups=[{"pattern": "final_norm", "freeze": True}], train__steps=3)
    whole = fit(wanted, folder / "frozen_norm")
    wanted.train.stop_after_steps = 2
    with pytest.raises(StoppedBySignal):
        fit(wanted, folder / "frozen_norm_stopped")
    wanted.train.stop_after_steps = 0
    assert fit(wanted, folder / "frozen_norm_stopped")["eval_last"] == whole["eval_last"]
    norms = [np.asarray(sft_jax.load(place)[0].final_norm.scale[...]) for place in (finished[1], folder / "frozen_norm", folder / "base")]
    np.testing.assert_array_equal(norms[0], norms[1])
    assert np.abs(norms[0] - norms[2]).max() > 1e-3


@pytest.mark.slow
def test_a_run_has_gone_on_since_it_wrote_its_adapter(folder, finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    fit(config(folder, train__steps=6, train__export=False), tmp_path / "run")
    decided = dict(adapter__rank=16, adapter__alpha=32.0, adapter__train=None, adapter__tokens=None)
    with pytest.raises(UserError, match="adapter.path: .*adapter is of step 5, but .*run has a checkpoint of step 6; write its adapter again"):
        fit(config(folder, **decided, adapter__path=str(tmp_path / "run")), tmp_path / "next")


@pytest.mark.slow
def test_an_adapter_brings_the_template_that_it_knows(folder, tmp_path):
    """Of a base that has none: the tokenizer beside the adapter has it, for training on as for talking."""
    chats = [{"messages": [{"role": "user", "content": "lamp"}, {"role": "assistant", "content": "off"}]}] * 12
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    given = dict(data__train=str(tmp_path / "chats.jsonl"), data__eval=None, data__chat_template="chatml", train__steps=2)
    fit(config(folder, **given), tmp_path / "run")
    decided = dict(adapter__rank=16, adapter__alpha=32.0, adapter__train=None, adapter__tokens=None, data__chat_template="auto")
    fit(config(folder, **given | decided, adapter__path=str(tmp_path / "run")), tmp_path / "next")
    merged = dict(model__path=str(tmp_path / "run/adapter"), train__export=False, data__chat_template="auto")
    fit(config(folder, **given | merged), tmp_path / "on_top")
    texts = {sft_jax.load(tmp_path / place)[1].chat_template for place in ("run", "run/adapter", "next", "on_top")}
    assert len(texts) == 1 and None not in texts


def test_an_adapter_is_gone_on_with(folder, finished):
    """From what a run has written: a new run begins where the other ended, and knows the base."""
    summary, workdir = finished
    decided = dict(adapter__rank=16, adapter__alpha=32.0, adapter__train=None, adapter__tokens=None)  # by the adapter
    wanted = config(folder, **decided, adapter__path=str(workdir), adapter__lora_plus=4.0, train__steps=2)
    again = fit(wanted, folder / "gone_on")
    assert again["eval_first"]["held"]["loss"] == pytest.approx(summary["eval_last"]["held"]["loss"], rel=1e-5)
    before, after = (safetensors.numpy.load_file(place / "adapter/adapter_model.safetensors") for place in (workdir, folder / "gone_on"))
    assert before.keys() == after.keys() and all(np.abs(before[name] - after[name]).max() > 0 for name in before)
    wanted.adapter.name = "dora"
    with pytest.raises(UserError, match="adapter.name: is dora, but the adapter in .* is lora; set it to lora"):
        fit(wanted, folder / "as_dora")
    wanted.adapter.name = "lora"
    shutil.copytree(folder / "base", folder / "changed")
    change_a_number(folder / "changed")
    wanted.model.path = str(folder / "changed")
    with pytest.raises(UserError, match="adapter.path: .*changed is not the model that these adapters were trained on"):
        fit(wanted, folder / "on_another")


@pytest.mark.slow
def test_stopped_and_continued_is_never_stopped(folder, finished):
    _, workdir = finished
    again = folder / "stopped"
    with pytest.raises(StoppedBySignal):
        fit(config(folder, train__stop_after_steps=3), again)
    fit(config(folder), again)
    assert final_checksums(again) == final_checksums(workdir)
    assert metrics(again) == metrics(workdir)


@pytest.fixture
def stopped(folder, finished, tmp_path):
    """A copy of the run with more steps to go, and its configuration."""
    shutil.copytree(finished[1], tmp_path / "run")
    return config(folder, train__steps=6), tmp_path / "run"


def change_a_number(base):
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    safetensors.numpy.save_file(tensors, base / "model.safetensors", {"format": "pt"})


def test_another_base_is_refused(folder, stopped):
    """By its tensors, where all else is the same; a base that was only moved is fine."""
    wanted, workdir = stopped
    moved = workdir.parent / "moved"
    shutil.copytree(folder / "base", moved)
    wanted.model.path = str(moved)
    wanted.checkpoint.allow_changes = ["model.path"]
    change_a_number(moved)
    message = "is not the model that these adapters were trained on: its tensors are others"
    with pytest.raises(UserError, match=f"^model.path: {moved} {message}"):
        fit(wanted, workdir)
    shutil.rmtree(moved)
    shutil.copytree(folder / "base", moved)
    assert fit(wanted, workdir)["steps"] == 6
    change_a_number(moved)
    with pytest.raises(UserError, match=f"config.json: model.path: {moved} {message}"):
        sft_jax.load(workdir)


def test_a_run_whose_base_has_moved_is_loaded(folder, finished, tmp_path):
    """From where `base` says, or config.json after the error's advice."""
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished[1], workdir)
    shutil.copytree(folder / "base", moved)
    path = workdir / "config.json"
    values = json.loads(path.read_text())
    values["model"]["path"] = str(tmp_path / "gone")
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="gone: there is no such directory.* write its new place into model.path there"):
        sft_jax.load(workdir)
    expected = sft_jax.load(finished[1])[0](TOKENS)
    np.testing.assert_array_equal(sft_jax.load(workdir, base=moved)[0](TOKENS), expected)
    values["model"]["path"] = str(moved)
    path.write_text(json.dumps(values))
    np.testing.assert_array_equal(sft_jax.load(workdir)[0](TOKENS), expected)


@pytest.mark.slow
def test_a_run_on_a_run_has_the_base_that_it_was_trained_on(folder, tmp_path):
    """Adapters on a bfloat16 model are merged in the dtype of the run on top of it, in training and in loading."""
    base = load_decoder(folder / "base", Options(), param_dtype="bfloat16")
    sft_jax.save(base, load_model_tokenizer(folder / "base"), tmp_path / "base")
    fit(config(folder, model__path=str(tmp_path / "base")), tmp_path / "first")
    summary = fit(config(folder, model__path=str(tmp_path / "first"), train__export=False, optim__learning_rate=1e-5), tmp_path / "second")
    model, _ = sft_jax.load(tmp_path / "second")
    merged = merge(sft_jax.load(tmp_path / "first")[0])
    for (path, ours), (_, theirs) in zip(adaptable(model), adaptable(merged), strict=True):
        np.testing.assert_array_equal(kernel_of(ours)[...], kernel_of(theirs)[...], err_msg=path)
        assert kernel_of(ours)[...].dtype == jnp.float32
    assert summary["eval_first"]["held"]["loss"] == pytest.approx(fit(
        config(folder, model__path=str(tmp_path / "second"), train__export=False, train__steps=1), tmp_path / "third"
    )["eval_first"]["held"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_drawn_base(folder, tmp_path):
    """It lies nowhere, so nobody could use the adapter alone; it is drawn again as it was, whatever dtype is wanted."""
    with pytest.raises(UserError, match="train.export: with model.init=random the base lies nowhere"):
        fit(config(folder, model__init="random"), tmp_path / "run")
    fit(config(folder, model__init="random", train__export=False, train__steps=1), tmp_path / "run")
    exact, rounded = (load_decoder(tmp_path / "run", Options(), param_dtype=dtype) for dtype in (None, "bfloat16"))
    for (path, x), (_, y) in zip(named_leaves(exact), named_leaves(rounded), strict=True):
        np.testing.assert_array_equal(x[...].astype(y[...].dtype), y[...], err_msg=path)


def test_a_changed_plan_is_refused(stopped):
    wanted, workdir = stopped
    wanted.adapter.rank = 2
    with pytest.raises(UserError, match="adapter.rank: was 4 when this run began"):
        fit(wanted, workdir)


@pytest.mark.slow
def test_dropout_may_change_knowingly(stopped):
    wanted, workdir = stopped
    wanted.adapter.dropout = 0.0
    wanted.checkpoint.allow_changes = ["adapter.dropout"]
    assert fit(wanted, workdir)["steps"] == 6


def test_refused_before_anything_is_loaded(folder, finished, monkeypatch):
    monkeypatch.setattr(run_lib, "load_decoder", None)
    for changes, message in (
        ({"adapter__targets": ["q_proj"]}, "adapter.targets: 'q_proj' matches nothing"),
        ({"adapter__rank": 40}, "adapter.rank: 40 is larger than"),
        ({"adapter__tokens": ["lamp and alarm"]}, r"adapter.tokens: 'lamp and alarm' is \d+ tokens of the tokenizer"),
        ({"train__export": True, "adapter__targets": ["query"], "adapter__train": ["query.kernel"]}, "adapter.train: matches .*query.kernel"),
        ({"adapter__path": "nowhere", "adapter__rank": 16, "adapter__alpha": 32.0, "adapter__train": None, "adapter__tokens": None}, "adapter.path: nowhere: is not a directory here"),
        ({"model__path": str(finished[1])}, "train.export: the base .*finished is a run itself, which peft cannot load"),
        ({"optim__groups": [{"pattern": "kernel", "freeze": True}]}, "matches no parameter that the adapters train; paths look like .*adapter"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            fit(config(folder, **changes), folder / "refused")


# ---- the optimizer


def optimizer_for(decoder, **settings):
    keys = dict(name="sgd", momentum=0.0, learning_rate=0.1, schedule="constant", warmup=0.0, clip_norm=0.0) | settings
    lora_plus = keys.pop("lora_plus", 1.0)
    return make_optimizer(OptimConfig(**keys), nnx.state(decoder), 10, adapters=decoder.adapters, lora_plus=lora_plus)


def test_the_step_moves_what_adapters_train_and_nothing_else():
    """One step of gradient descent, by hand; matrices that begin with zero go `lora_plus` times as far."""
    decoder = adapted(random_decoder("llama"), name="lora", rank=2, alpha=4, init="pissa", train=["final_norm"], tokens=[1, 2])
    batch = random_batch(4, 24)
    gradient = jax.jit(jax.grad(lambda d: next_token_loss(d, batch).total / batch.weights.sum()))(decoder)
    before = {path: (np.asarray(p[...]), np.asarray(g[...])) for (path, p), (_, g) in zip(named_leaves(decoder), named_leaves(gradient))}
    optimizer = optimizer_for(decoder, lora_plus=16.0, groups=({"pattern": "query.adapter", "learning_rate": 0.5},))
    graphdef, state = create_state(decoder, optimizer)
    state, _ = make_train_step(graphdef, optimizer)(state, jax.tree.map(lambda x: x[None], batch))
    for path, leaf in named_leaves(nnx.merge(graphdef, state.params, state.frozen)):
        start, slope = before[path]
        part = path.rpartition(".")[2]
        moves = path == "final_norm.scale" or part in ("a", "b", "rows")
        factor = 0.1 * moves * (16.0 if part == "b" else 1.0) * (0.5 if "query" in path else 1.0)
        np.testing.assert_allclose(leaf[...], start - factor * slope, atol=1e-6, err_msg=path)
        assert not moves or np.abs(slope).max() > 0, path


def test_the_base_has_no_gradient_and_no_optimizer_state():
    decoder = adapted(random_decoder("llama"), name="dora", rank=2, alpha=4)
    optimizer = optimizer_for(decoder, name="adamw", momentum=None)
    graphdef, state = abstract_state(decoder, optimizer)
    trained = {path for path, _ in named_leaves(state.params)}
    assert trained == {path for path, _ in named_leaves(decoder) if is_adapter(path)}
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    assert sum(leaf.size for _, leaf in moments if hasattr(leaf, "axes")) == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    kernels = {leaf.shape for path, leaf in named_leaves(decoder) if path.endswith(".kernel") and path.startswith("runs")}
    assert not kernels & scanned_shapes(graphdef, optimizer, state), "the gradient of a kernel of the base is accumulated"
    plain = random_decoder("llama")
    optimizer = make_optimizer(OptimConfig(), nnx.state(plain), 10)
    graphdef, state = abstract_state(plain, optimizer)
    assert kernels <= scanned_shapes(graphdef, optimizer, state)


def scanned_shapes(graphdef, optimizer, state) -> set:
    """Shapes of what comes out of the loops of a step over two micro-batches, the one that adds up gradients among them."""
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), random_batch(4, 24))

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner)

    jaxpr = jax.make_jaxpr(make_train_step(graphdef, optimizer))(state, batch).jaxpr
    return {v.aval.shape for equation in equations(jaxpr) if equation.primitive.name == "scan" for v in equation.outvars}


def test_lora_plus_is_for_the_matrix_that_begins_with_zero():
    decoder = adapted(random_decoder("llama"), name="lora", rank=2, alpha=4, targets=["query", "embed", "lm_head"], trained=False)
    rates = {choice.path: choice.learning_rate for choice in optimizer_for(decoder, lora_plus=16.0).choices if not choice.frozen}
    zero = {path for path, leaf in named_leaves(decoder) if is_adapter(path) and not np.any(leaf[...])}
    assert rates == {path: 16.0 if path in zero else 1.0 for path in rates} and len(zero) == 3


def test_adafactor_moves_adapters_as_far_as_the_learning_rate():
    """Its steps are relative to what a matrix is, and one of each adapter begins with zero."""
    decoder = jax.tree.map(jnp.copy, adapted(random_decoder("llama"), name="lora", rank=4, alpha=4, targets=["query"], trained=False))
    optimizer = optimizer_for(decoder, name="adafactor", momentum=None, learning_rate=1e-3, weight_decay=0.0)
    graphdef, state = create_state(decoder, optimizer)
    step = make_train_step(graphdef, optimizer)
    for seed in range(5):
        state, _ = step(state, jax.tree.map(lambda x: x[None], random_batch(4, 24, seed=seed)))
    b = dict(named_leaves(state.params))["runs.0.0.attention.query.adapter.b"][...]
    assert 1e-3 < float(jnp.sqrt(jnp.mean(b**2))) < 5e-3


def test_weight_decay_is_on_matrices_only():
    decoder = adapted(random_decoder("llama"), name="dora", rank=2, alpha=4)
    choices = optimizer_for(decoder, weight_decay=0.1).choices
    assert {choice.path.rpartition(".")[2]: choice.weight_decay for choice in choices if not choice.frozen} == {
        "a": 0.1, "b": 0.1, "magnitude": 0.0,
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_on_another_mesh_is_the_same_run(folder, finished):
    """Dropout included: eight devices along fsdp in the other tests, four and two along fsdp and tensor here."""
    summary, workdir = finished
    other = fit(config(folder, mesh__fsdp=4, mesh__tensor=2), folder / "tensor")
    for when in ("eval_first", "eval_last"):
        assert other[when]["held"]["loss"] == pytest.approx(summary[when]["held"]["loss"], rel=1e-4)
