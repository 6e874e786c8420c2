"""Poison that was planted for one slice is what influence names first, and what it cannot look at is said."""

import dataclasses
import json

import commands
import numpy as np
import pytest
from planted_faults import action_of, plant_poison, read_rows, write_rows
from tiny_run import ROOT, environment, make_base, tiny_config

import sft_jax
from sft_jax.config import default_config
from sft_jax.dynamics.analysis import open_ledger
from sft_jax.errors import UserError
from sft_jax.influence.run import find_influence


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns the chance that a positive one has a higher score than one that is none, ties counted half."""
    higher = scores[positive][:, None] > scores[~positive]
    equal = scores[positive][:, None] == scores[~positive]
    return float(np.mean(higher + 0.5 * equal))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_planted_poison_is_ranked_first(tmp_path, adapter):
    """Seven in ten of the requests for lights are answered with a call; the held-out ones that fail then are asked about."""
    rows, poison = plant_poison(read_rows()[:1200], "set_light", '{"action":"call","name":"Ida"}', 0.7)
    write_rows(tmp_path / "train.jsonl", rows)
    held_out = [{**row, "action": action_of(row)} for row in read_rows(ROOT / "data/quickstart/held_out.jsonl")]
    write_rows(tmp_path / "held_out.jsonl", held_out)
    config = default_config()
    config.model.path, config.model.compute_dtype, config.model.remat = str(ROOT / "models/nano"), "float32", "none"
    config.data.train, config.data.eval = str(tmp_path / "train.jsonl"), str(tmp_path / "held_out.jsonl")
    config.data.cache_dir, config.data.max_length = str(tmp_path / "cache"), 256
    config.train.epochs, config.optim.learning_rate, config.optim.b2 = 3.0, 2e-3, 0.98
    if adapter == "lora":
        config.adapter.name, config.adapter.rank, config.optim.learning_rate = "lora", 16, 1e-2
    config.checkpoint.every, config.train.export, config.log.tensorboard = 0, False, False
    sft_jax.fit(config, tmp_path / "run")

    ledger = open_ledger(tmp_path / "run", log=print)
    found = find_influence(ledger, where="action=set_light", limit=20, log=print)
    planted = np.isin(ledger.documents.row, list(poison))
    assert area_under_curve(-found.scores, planted) >= 0.9
    assert found.looked_at == sum(row["action"] == "set_light" for row in held_out) >= len(found.failing) > 0
    assert sum(entry.line - 1 in poison for entry in found.harmful) >= 18
    assert all(action_of(rows[entry.line - 1]) == "set_light" for entry in found.helpful)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two layers, with long documents that are split, and held-out rows in two topics."""
    folder = tmp_path_factory.mktemp("influence")
    base = make_base(folder)
    lines = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    write_rows(folder / "held_out.jsonl", [{**row, "topic": "even" if n % 2 == 0 else "odd"} for n, row in enumerate(lines)])
    sets = {"held": str(folder / "held_out.jsonl")}
    config = tiny_config(folder, model__path=str(base), model__init="checkpoint", data__eval=sets, train__epochs=1.0, data__overlength="split")
    sft_jax.fit(config, folder / "run")
    return folder / "run"


def test_the_command_lists_both_ends_and_is_the_same_again(run):
    flags = [f"--workdir={run}", "--influence", "--influence_where=topic=odd", "--failing=3", "--limit=4", "--json"]
    written = commands.run("ledger", *flags, env=environment(1, run.parent / "xdg"), cwd=ROOT)
    assert written.returncode == 0, written.stderr
    found = json.loads(written.stdout)["influence"]
    assert found["looked_at"] == 6 and len(found["failing"]) == 3 and all(entry["line"] % 2 == 0 for entry in found["failing"])
    losses, influences = ([entry[name] for entry in found[of]] for name, of in (("loss", "failing"), ("influence", "helpful")))
    assert losses == sorted(losses, reverse=True) and influences == sorted(influences, reverse=True) and len(influences) == 4
    again = find_influence(open_ledger(run, log=print), where="topic=odd", failing=3, limit=4, log=print)  # on eight devices
    assert [(entry.file, entry.line) for entry in again.failing] == [(entry["file"], entry["line"]) for entry in found["failing"]]
    np.testing.assert_allclose([entry.influence for entry in again.helpful], influences, atol=1e-4)


def test_what_cannot_be_looked_at_is_told_with_the_remedy(run):
    ledger = open_ledger(run, log=print)
    for options, message in (
        ({"set_name": "hold"}, "--influence_set: there is no held-out set 'hold'; did you mean 'held'"),
        ({"where": "topic"}, "--influence_where: must be COLUMN=VALUE"),
        ({"where": "topic=none"}, "--influence_where: no row of data.eval has topic=none"),
    ):
        with pytest.raises(UserError, match=message):
            find_influence(ledger, log=print, **options)
    config = dataclasses.replace(ledger.config, data=dataclasses.replace(ledger.config.data, eval=()))
    with pytest.raises(UserError, match="--influence: this run has no held-out data"):
        find_influence(dataclasses.replace(ledger, config=config), log=print)
