"""What a sweep runs is what its grid, list and seeds say; what they say wrongly is told before anything is run."""

import doctest
import json

import pytest

from sft_jax.config import default_config
from sft_jax.errors import UserError
from sft_jax.experiments import overrides, runs
from sft_jax.experiments.overrides import read_grid, read_list, read_seeds, spread_grid
from sft_jax.experiments.runs import file_name, make_runs


def recipe(**sections):
    raw = default_config().to_dict()
    raw["model"]["path"], raw["data"]["train"] = "model", "train.jsonl"
    for name, values in sections.items():
        raw[name] |= values
    return raw


@pytest.mark.parametrize("module", [overrides, runs])
def test_examples_of_docstrings_hold(module):
    failed, count = doctest.testmod(module)
    assert count and not failed


def test_a_grid_is_a_product_in_the_order_in_which_it_is_written():
    points = read_grid(["optim.learning_rate=1e-5,3e-5", "adapter.rank=8,32", "adapter.name=lora"])
    assert [(point["optim.learning_rate"], point["adapter.rank"]) for point in points] == [(1e-5, 8), (1e-5, 32), (3e-5, 8), (3e-5, 32)]
    found = make_runs(recipe(), points, [3, 4])
    assert [run.config.seed for run in found] == [3, 4] * 4
    assert [run.config.adapter.rank for run in found] == [8, 8, 32, 32] * 2
    assert found[1].name == "learning_rate=1e-05_rank=8_name=lora_seed=4"


def test_values_are_lists_texts_and_booleans_too():
    points = read_grid(["adapter.targets=['q','v'],['q']", "train.deterministic=true,False", 'data.chat_template="a,b"'])
    assert [point["adapter.targets"] for point in points] == [["q", "v"]] * 2 + [["q"]] * 2
    assert [point["train.deterministic"] for point in points] == [True, False] * 2 and points[0]["data.chat_template"] == "a,b"


def test_keys_of_data_reach_the_sets_that_inherit_them():
    found = make_runs(recipe(), read_grid(["data.overlength=drop,split"]), [0])
    assert [run.config.data.train[0].overlength for run in found] == ["drop", "split"]


def test_the_recipe_is_left_as_it_is():
    raw = recipe()
    before = json.dumps(raw)
    make_runs(raw, read_grid(["optim.learning_rate=1e-5,3e-5"]), [0])
    assert json.dumps(raw) == before


def test_names_that_no_folder_can_have_differ_where_the_texts_do():
    names = [file_name(f"path={path} seed=0") for path in ("a/b", "a:b", "c" * 300, "c" * 301)]
    assert len(set(names)) == 4 and all("/" not in name and len(name) < 120 for name in names)


@pytest.mark.parametrize("arguments", ["", "--json", "--grid", "--grid --json", "--x 1 --grid=a=1 --y 2"])
def test_other_arguments_are_left_alone(arguments):
    assert spread_grid(["sweep", *arguments.split()]) == ["sweep", *arguments.split()]


def test_seeds():
    assert read_seeds("3", 7) == [7, 8, 9] and read_seeds("2,5", 0) == [2, 5]


BAD = [
    (lambda: read_grid(["optim.learning_rat=1"]), "optim.learning_rat' is no key of the configuration; did you mean 'optim.learning_rate'?"),
    (lambda: read_grid(["optim=1"]), "'optim' is a section; name a key of it: "),
    (lambda: read_grid(["optim.b1"]), "'optim.b1' has no values"),
    (lambda: read_grid(["optim.b1=.9", "optim.b1=.8"]), "optim.b1 is there twice"),
    (lambda: read_seeds("x", 0), "--seeds: must be a number of seeds or a list"),
    (lambda: read_seeds("0", 0), "--seeds: must be at least 1"),
    (lambda: read_seeds("1,1", 0), "has a seed twice"),
    (lambda: make_runs(recipe(adapter={"name": "lora"}), read_grid(["adapter.rank=8,x"]), [0]), "adapter.rank: must be int, not 'x'"),
    (lambda: make_runs(recipe(), read_grid(["optim.learning_rate=1e-5,0.00001"]), [0]), "is there twice"),
    (lambda: make_runs(recipe(train={"stop_after_steps": 3}), [{}], [0]), "train.stop_after_steps: would leave every run unfinished"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_is_wrong_is_one_message(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"adapter.rank": 8}\n{"adapter.rnk": 8}', ":2: 'adapter.rnk' is no key of the configuration; did you mean 'adapter.rank'?"),
        ('\n{"adapter.rank": 8', ":2: is not JSON"),
        ("[1]", ":1: must be an object"),
        ("\n", "is empty"),
    ],
)
def test_what_is_wrong_in_a_list_is_named_by_its_line(tmp_path, text, message):
    (tmp_path / "settings.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        read_list(str(tmp_path / "settings.jsonl"))
    assert f"settings.jsonl{message}" in str(error.value) or f"settings.jsonl: {message}" in str(error.value)


def test_a_list_is_a_setting_a_line(tmp_path):
    (tmp_path / "settings.jsonl").write_text('{"adapter.rank": 8, "seed": 5}\n\n{"optim.schedule": "linear"}\n')
    found = make_runs(recipe(adapter={"name": "lora"}), read_list(str(tmp_path / "settings.jsonl")), [0])
    assert [(run.config.adapter.rank, run.config.optim.schedule, run.seed) for run in found] == [(8, "cosine", 5), (16, "linear", 0)]
    with pytest.raises(UserError, match="cannot be read"):
        read_list(str(tmp_path / "none.jsonl"))
