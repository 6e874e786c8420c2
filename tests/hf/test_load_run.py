"""A run's workdir stands for its newest sound checkpoint, or for its export where it has none."""

import json
import os
import shutil
from typing import NamedTuple

import commands
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tiny_models import CONFIGS, random_decoder, to_tensors
from tiny_run import ROOT
from xla_flags import xla_flags

from sft_jax.checkpoint.checkpoints import Checkpoints, flatten_state
from sft_jax.data.chats.templates import resolve_template
from sft_jax.errors import UserError
from sft_jax.hf.files import SINGLE_FILE
from sft_jax.hf.load import load, load_decoder, load_model_tokenizer
from sft_jax.hf.save import save
from sft_jax.hf.source import Provenance, Source, checkpoint_of, find_model
from sft_jax.model.options import Options
from sft_jax.model.sharding import make_mesh, named_leaves, shardings


class State(NamedTuple):
    """As the state of training: what is trained, what is frozen, and more that a model does not need."""

    step: jax.Array
    params: nnx.State
    frozen: nnx.State
    opt_state: dict


def scaled(factor: float):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) * factor, random_decoder("llama"))


def save_checkpoint(run, step: int, decoder) -> None:
    is_norm = lambda path, _: "scale" in path  # noqa: E731
    _, frozen, params = nnx.split(decoder, is_norm, ...)
    state = State(jnp.int32(step), params, frozen, {"mu": jnp.ones(5)})
    checkpoints = Checkpoints(run / "checkpoints", keep=3)
    config = json.loads((run / "config.json").read_text())
    manifest = {"model_config": json.dumps(CONFIGS["llama"]), "config": config, "plan_hash": f"rows of {run.name}"}
    checkpoints.save(step, flatten_state(state), manifest)
    checkpoints.close()


def equal(ours, theirs) -> bool:
    pairs = zip(named_leaves(ours), named_leaves(theirs), strict=True)
    return all(np.array_equal(a.get_value(), b.get_value()) for (_, a), (_, b) in pairs)


@pytest.fixture
def run(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    decoder = random_decoder("llama")
    tensors = to_tensors(decoder, decoder, CONFIGS["llama"])
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, base / SINGLE_FILE)
    (base / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": {"path": str(base)}, "data": {"chat_template": "auto"}}))
    return run


def export(run, decoder, dtype=None) -> None:
    decoder.source = Source("base", json.dumps(CONFIGS["llama"]), None)
    save(decoder, None, run / "export", dtype=dtype)


def test_the_template_of_a_run_without_an_export_has_its_arguments_as_defaults(run):
    shutil.copy(ROOT / "models/nano/tokenizer.json", run.parent / "base")
    shutil.copy(ROOT / "models/nano/tokenizer_config.json", run.parent / "base")
    (run.parent / "thinks.jinja").write_text("{{ 'on' if thinking is not defined or thinking else 'off' }}")
    data = {"chat_template": str(run.parent / "thinks.jinja"), "chat_template_kwargs": {"thinking": False}}
    (run / "config.json").write_text(json.dumps({"model": {"path": str(run.parent / "base")}, "data": data}))
    save_checkpoint(run, 10, scaled(2.0))
    template = resolve_template("auto", load_model_tokenizer(run))
    assert (template.render([]), template.render([], thinking=True)) == ("off", "on")


def test_the_newest_checkpoint_of_a_run_under_way(run):
    save_checkpoint(run, 10, scaled(2.0))
    save_checkpoint(run, 20, scaled(3.0))
    decoder, tokenizer = load(run)
    assert tokenizer is None and decoder.source.name == str(run)
    assert decoder.source.provenance == Provenance(str(run.parent / "base"), "rows of run", 20)
    assert equal(decoder, scaled(3.0))
    mesh = make_mesh(1, 4, 2)
    spread = load_decoder(run, Options(), mesh, "bfloat16")
    assert equal(spread, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), scaled(3.0)))
    assert spread.source.fingerprint == decoder.source.fingerprint  # of the numbers in the checkpoint
    for (path, leaf), (_, place) in zip(named_leaves(spread), named_leaves(shardings(spread, mesh)), strict=True):
        assert leaf.get_value().sharding.is_equivalent_to(place.get_value(), leaf.ndim), path


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(run, capsys):
    save_checkpoint(run, 10, scaled(2.0))
    save_checkpoint(run, 20, scaled(3.0))
    largest = max((run / "checkpoints" / "20").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert equal(load(run)[0], scaled(2.0))
    assert "20 is damaged" in capsys.readouterr().err
    for path in (run / "checkpoints" / "10").rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            path.unlink()
    with pytest.raises(UserError, match="every checkpoint of this run is damaged; copy one back.$"):
        load(run)
    export(run, scaled(3.0))
    with pytest.raises(UserError, match="is damaged; copy one back, or name .*export.$"):
        load(run)


def test_the_checkpoint_goes_before_the_export_which_is_rounded(run):
    save_checkpoint(run, 10, scaled(1 / 3))
    export(run, scaled(1 / 3), dtype="bfloat16")
    assert find_model(run) == run / "export" and checkpoint_of(run) == run / "checkpoints" / "10"
    assert equal(load(run)[0], scaled(1 / 3))


def test_an_export_without_checkpoints(run):
    export(run, scaled(5.0))
    assert checkpoint_of(run) is None and equal(load(run)[0], scaled(5.0))


def test_the_export_command_names_base_and_data(run, tmp_path):
    """Of a run, and of an export, which says what the run said; the numbers are those of the checkpoint."""
    save_checkpoint(run, 1200, scaled(1 / 3))
    export(run, scaled(1 / 3), dtype="bfloat16")
    for source, out in ((run, tmp_path / "first"), (tmp_path / "first", tmp_path / "second")):
        done = commands.run("export", f"--model={source}", f"--out={out}", "--dtype=float32", env={**os.environ, "XLA_FLAGS": xla_flags()})
        assert done.returncode == 0, done.stderr
        readme = (out / "README.md").read_text()
        for part in (f"| base model | `{tmp_path / 'base'}` |", "| data fingerprint | `rows of run` |", "steps | 1,200 |"):
            assert part in readme, readme
        assert "# base\n" in readme and "base_model:" not in readme
        assert equal(load(out)[0], scaled(1 / 3))


def test_a_run_that_began_from_a_run(run, tmp_path):
    save_checkpoint(run, 10, scaled(2.0))
    second = tmp_path / "second"
    second.mkdir()
    (second / "config.json").write_text(json.dumps({"model": {"path": str(run)}, "data": {"chat_template": "auto"}}))
    save_checkpoint(second, 5, scaled(4.0))
    assert find_model(second) == tmp_path / "base"
    assert equal(load(second)[0], scaled(4.0))


def test_random_parameters_of_a_run_are_not_its_checkpoint(run):
    save_checkpoint(run, 10, scaled(2.0))
    assert not equal(load_decoder(run, Options(), init="random"), scaled(2.0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"path": "RUN"}, "data": {}}, "model.path names the run itself"),
        ({"model": {"path": "/no/such/place"}, "data": {}}, "run/config.json: model.path.*/no/such/place: there is no"),
        ({"model": {"path": "some/base"}, "data": {}}, "run/config.json: model.path.*some/base: .*no hub.*has moved"),
        ({}, "is not the configuration of a run"),
    ],
)
def test_a_run_whose_base_cannot_be_found(run, config, message, monkeypatch):
    def no_hub(*_, **__):
        raise ConnectionError("no hub")

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, no_hub)
    save_checkpoint(run, 10, scaled(2.0))
    (run / "config.json").write_text(json.dumps(config).replace("RUN", str(run)))
    with pytest.raises(UserError, match=message):
        load(run)


def test_a_run_that_has_saved_nothing(run):
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is a run that has saved nothing yet"):
        load(run)


def test_a_model_directory_may_have_a_folder_of_that_name(run):
    base = run.parent / "base"
    (base / "checkpoints" / "7").mkdir(parents=True)
    assert find_model(base) == base and equal(load(base)[0], random_decoder("llama"))


def test_a_base_that_has_changed_since(run):
    """The checkpoint says what model it is of; the base only lends its tokenizer and generation_config.json."""
    save_checkpoint(run, 10, scaled(2.0))
    (run.parent / "base" / "config.json").write_text(json.dumps({**CONFIGS["llama"], "rms_norm_eps": 1e-4}))
    decoder = load(run)[0]
    assert decoder.spec.norm.epsilon == CONFIGS["llama"]["rms_norm_eps"] and equal(decoder, scaled(2.0))
