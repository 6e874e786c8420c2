"""Faults that were planted are found, on the embedded model: the worst by ledger, contradictions, and a slice that is bad."""

import json

import commands
import pytest
from planted_faults import action_of, answered, plant_wrong_answers, read_rows, write_rows
from tiny_run import ROOT, environment

import sft_jax
from sft_jax.config import default_config
from sft_jax.dynamics.analysis import CONFLICT, Analysis, analyse, open_ledger

pytestmark = pytest.mark.slow  # a model has to learn before anything can be told
ROWS, SHARE, CONFLICTS = 1000, 0.05, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def planted(folder) -> dict[int, int]:
    """A run on rows of which one in twenty has a wrong answer; line of each wrong row -> line with its prompt, where there is one.

    Half a minute on two cores: how an example is learnt among others can only be seen while a model learns.
    """
    rows = [{**row, "meta": {"action": action_of(row)}} for row in read_rows()[: ROWS - CONFLICTS]]
    count = round(SHARE * ROWS)
    rows, wrong = plant_wrong_answers(rows, (count - CONFLICTS) / len(rows))
    partners = {number + 1: 0 for number in wrong}
    alone = {row["messages"][0]["content"]: number for number, row in enumerate(rows) if number not in wrong}
    for number in sorted(alone.values())[10 : 10 + CONFLICTS]:
        other = next(row for row in rows if action_of(row) != action_of(rows[number]))
        rows.append(answered(rows[number], other["messages"][-1]["content"]))
        partners[len(rows)] = number + 1
    write_rows(folder / "train.jsonl", rows)
    config = default_config()
    config.model.path, config.model.compute_dtype, config.model.remat = str(ROOT / "models/nano"), "float32", "none"
    config.data.train, config.data.cache_dir, config.data.max_length = str(folder / "train.jsonl"), str(folder / "cache"), 256
    config.train.epochs, config.optim.learning_rate, config.optim.b2 = 3.0, 2e-3, 0.98
    config.checkpoint.every, config.train.export, config.log.tensorboard = 0, False, False
    sft_jax.fit(config, folder / "run")
    return partners


@pytest.fixture(scope="module")
def analysis(folder, planted) -> Analysis:
    return analyse(open_ledger(folder / "run", log=print), column="meta.action", limit=0)


def test_four_fifths_of_the_worst_are_wrong_answers(analysis, planted):
    worst = analysis.worst[: len(planted)]
    assert len(planted) == SHARE * ROWS and analysis.examples == ROWS
    assert sum(entry.line in planted for entry in worst) >= 0.8 * len(planted)
    assert all(len(entry.loss) == 3 and sorted(entry.steps) == list(entry.steps) for entry in worst)


def test_what_was_never_learnt_is_wrong_and_most_that_is_wrong_is_named(analysis, planted):
    named = [entry.line in planted for entry in analysis.kinds["never_learnt"].examples]
    assert sum(named) >= 0.8 * len(named) and sum(named) >= 0.8 * len(planted)


def test_a_duplicate_that_contradicts_is_named_with_its_partner_and_the_model_sides_with_the_right_one(analysis, planted):
    kind = analysis.kinds[CONFLICT]
    found = {entry.line: entry.detail for entry in kind.examples}
    expected = {line: partner for line, partner in planted.items() if partner}
    assert found.keys() == expected.keys() and kind.count == CONFLICTS, "the wrong one of each pair has the higher loss"
    for line, partner in expected.items():
        assert f"train.jsonl:{partner} with " in found[line]


def test_numbers_of_slices_add_up_to_those_of_the_set(analysis):
    [whole] = analysis.sets
    assert (whole.examples, whole.exposures) == (ROWS, 3 * ROWS) and len(analysis.slices) > 8
    assert {group.name for group in analysis.slices} == {action_of(row) for row in read_rows()[:ROWS]}
    for name in ("examples", "exposures", "learnt"):
        assert sum(getattr(group, name) for group in analysis.slices) == getattr(whole, name)
    for kind, count in whole.found.items():
        assert sum(group.found[kind] for group in analysis.slices) == count == analysis.kinds[kind].count
    assert whole.last_loss < whole.first_loss and 0 < whole.last_accuracy < 1


def test_the_command_writes_one_object_or_tables(folder, planted):
    ledger = [f"--workdir={folder / 'run'}", "--limit=2", "--slice=meta.action"]
    written, shown = (
        commands.run("ledger", *ledger, *flags, env=environment(1, folder / "xdg"), cwd=ROOT, terminal=bool(flags)) for flags in (["--json"], [])
    )
    commands.assert_bar(written)
    assert (written.returncode, shown.returncode) == (0, 0), written.stderr + shown.stderr
    found = json.loads(written.stdout)
    assert found["influence"] is None and len(found["worst"]) == 2 and len(found["kinds"]["never_learnt"]["examples"]) == 2
    assert f"train.jsonl:{found['worst'][0]['line']}" in shown.stdout and "never_learnt: " in shown.stdout and "set_light" in shown.stdout
