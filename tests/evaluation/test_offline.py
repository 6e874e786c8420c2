"""A model or a checkpoint evaluated by itself: the numbers are those of the run, and of each slice alone."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import commands
from slow_values import slow
from tiny_run import ROOT, environment, make_rows, tiny_config

from sft_jax import fit
from sft_jax.config import SamplingConfig
from sft_jax.config_parsing import parse_config
from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.errors import UserError
from sft_jax.evaluation.evals import Evaluator
from sft_jax.evaluation.offline import Evaluation, Subject, evaluate_model, open_decoder, open_held_out
from sft_jax.evaluation.step import make_eval_step, split_model
from sft_jax.hf.source import run_and_step
from sft_jax.model.sharding import make_mesh

SCORERS = ("exact_match", "token_f1", "choice:options", "choice_by_byte:options", "json_schema")


def with_columns(path):
    """Gives the rows of a file columns: a source, nested facts, choices that hold the answer, and a schema."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        answer = row["messages"][-1]["content"]
        row |= {"source": "ab"[number % 3 == 0], "facts": {"long": len(row["messages"]) > 2}, "number": number, "schema": {"type": "array"}}
        row["options"] = [answer, "rain", "noon train seven lamp"] if number % 2 else ["rain", answer]
        if answer == "rain":
            row["options"] = ["rain", "noon"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    tiny_config(folder)
    make_rows(folder / "held_out.jsonl", 30, seed=1)
    with_columns(folder / "held_out.jsonl")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A run that evaluates at steps 0, 1, 2 and 4, with drawn answers and by slices, and has checkpoints of 2 and 4."""
    pytest.importorskip("jsonschema")
    config = tiny_config(
        folder, data__eval={"held": str(folder / "held_out.jsonl")}, eval__every=2, eval__generate=6, eval__scorers=list(SCORERS),
        eval__max_new_tokens=12, eval__at=[1, 9], eval__slices=["source", "facts.long"], eval__stop=["a,"], train__steps=4, train__export=True,
    )  # fmt: skip
    config.eval.sampling.update(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=3)
    fit(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def config(run):
    return parse_config(json.loads((run / "config.json").read_text()), needs_data=False)


def evaluate(run, config, *, step=None, **rest) -> Evaluation:
    return evaluate_model(Subject(str(run), step), config, make_mesh(1, -1, 1), log=lambda line: None, **rest)


def with_eval(config, **changes):
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes))


@pytest.fixture(scope="module")
def whole(run, config):
    return evaluate(run, with_eval(config, generate=-1))


@pytest.mark.parametrize("step", [None, *slow(2)])
def test_a_checkpoint_evaluates_to_what_the_run_said(run, config, step):
    evaluation = evaluate(run, config, step=step)
    found, described = evaluation.results["held"], evaluation.to_dict()["sets"]["held"]
    said = recorded(run, step or 4)
    assert_said(said, described)
    assert set(said["slices"]["source"]) == {"a", "b"} and said["intervals"]["token_f1"][0] <= said["token_f1"] <= said["intervals"]["token_f1"][1]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    expected = [{k: v for k, v in sample.items() if k not in ("step", "set")} for sample in samples if sample["step"] == (step or 4)]
    assert found.records == expected and {"choice:options", "finished"} <= expected[0].keys()


def recorded(run, step):
    """What a run said of its held-out set after a step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (said,) = [record for record in records if record["split"] == "held" and record["step"] == step]
    return said


def assert_said(said, described):
    """Asserts that the record of a run says what an evaluation does, of every slice too."""
    scores = described["scores"]
    numbers = {name: value for name, value in described.items() if name not in ("scores", "slices", "loss_interval")}
    own = {name: value for name, value in said.items() if name not in ("step", "split", "intervals", "slices")}
    assert own == pytest.approx({**numbers, **{name: score["value"] for name, score in scores.items()}}, rel=1e-6)
    intervals = {"loss": described["loss_interval"], **{name: score["interval"] for name, score in scores.items()}}
    assert flat(said["intervals"]) == pytest.approx(flat(intervals), rel=1e-6, nan_ok=True)
    assert flat(said["slices"]) == pytest.approx(flat(described["slices"]), rel=1e-6, nan_ok=True)


def flat(node, path=()):
    """The leaves of dicts and lists by their path, null as NaN."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, (dict, list)):
        return {k: v for key, value in items for k, v in flat(value, (*path, key)).items()}
    return {path: math.nan if node is None else node}


def test_a_run_evaluates_at_the_chosen_steps_and_its_summary_says_what_its_log_does(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["split"] == "held"] == [0, 1, 2, 4]
    last = {name: value for name, value in recorded(run, 4).items() if name not in ("step", "split")}
    assert json.loads((run / "summary.json").read_text())["eval_last"] == {"held": last}


def test_the_command_with_the_same_flags_says_what_the_run_did(folder, run):
    """Of a recipe that sets nothing of it, so that every flag counts; of the run's own configuration it is the same."""
    same = [
        "--generate=6", "--max_new_tokens=12", *(f"--scorer={name}" for name in SCORERS), "--slice=source", "--slice=facts.long", "--stop=a,",
        "--temperature=0.9", "--top_k=40", "--top_p=0.95", "--min_p=0.01", "--repetition_penalty=1.1", "--seed=3",
    ]  # fmt: skip
    recipe = [
        f"--config={ROOT / 'configs/sft.py'}", f"--config.data.eval={{'held': {str(folder / 'held_out.jsonl')!r}}}", "--config.data.max_length=96",
        "--config.model.compute_dtype=float32", f"--config.data.cache_dir={folder / 'cache'}", "--config.data.workers=1", "--batch_size=8",
    ]  # fmt: skip
    result = commands.run("evaluate", f"--model={run / 'checkpoints' / '2'}", *recipe, *same, "--json", env=environment(8, folder / "xdg"))
    assert result.returncode == 0, result.stderr
    assert_said(recorded(run, 2), json.loads(result.stdout)["sets"]["held"])


@pytest.fixture(scope="module")
def elsewhere(folder, run):
    """The run as if it had been trained on a mesh of four devices."""
    shutil.copytree(run, folder / "elsewhere")
    path = folder / "elsewhere" / "config.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({**recorded, "mesh": {**recorded["mesh"], "fsdp": 4}}))
    return folder / "elsewhere"


def on_one_device(folder, command, run, *arguments):
    return commands.run(command, f"--model={run}", *arguments, env=environment(1, folder / "xdg"), cwd=folder)


def test_keys_are_changed_over_the_configuration_of_a_run_whose_mesh_does_not_bind(folder, run, elsewhere):
    (folder / "few.jsonl").write_text("".join((folder / "held_out.jsonl").read_text().splitlines(keepends=True)[:3]))
    arguments = ["--config.data.eval=few.jsonl", "--config.data.supervise=all", "--generate=2", "--json"]
    result = on_one_device(folder, "evaluate", elsewhere, *arguments)
    assert result.returncode == 0, result.stderr
    assert [line.partition(" (")[0] for line in result.stderr.splitlines() if "mesh" in line] == ["The run's mesh is not for the devices here"]
    found, few = json.loads(result.stdout)["sets"]["eval"], json.loads(on_one_device(folder, "evaluate", run, *arguments).stdout)["sets"]["eval"]
    assert found == few and found["examples"] == 3 and found["scores"].keys() == set(SCORERS) and set(found["slices"]["source"]) == {"a", "b"}


def test_what_a_set_of_a_run_has_inherited_is_changed_with_its_section(folder, run, whole):
    result = on_one_device(folder, "evaluate", run, "--config.data.supervise=all", "--generate=2", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["sets"]["held"]["tokens"] > whole.to_dict()["sets"]["held"]["tokens"]


def test_compare_takes_keys_over_the_configuration_of_a_run_too(folder, elsewhere):
    arguments = [f"--model={elsewhere / 'checkpoints/2'}", "--config.eval.max_new_tokens=3", "--generate=4", "--scorer=contains", "--latency=0", "--json"]
    result = on_one_device(folder, "compare", elsewhere, *arguments)
    assert result.returncode == 0 and "The run's mesh is not for the devices here" in result.stderr, result.stderr
    assert max(each["answer_tokens"] for each in json.loads(result.stdout)["contenders"]) <= 4


@pytest.mark.parametrize("command", ["evaluate", *slow("compare")])
@pytest.mark.parametrize(
    ("key", "message"),
    [("optim.learnig_rate=1", "Unknown key 'optim.learnig_rate'; did you mean 'optim.learning_rate'?"),
     ("train.batch_size=many", "--config.train.batch_size=many"), ("model.dtype=fp32", "model.dtype: 'fp32' is not a choice"),
     ("mesh.fsdp=4", "mesh.fsdp=4")],
)  # fmt: skip
def test_wrong_keys_over_the_configuration_of_a_run_are_one_message(folder, run, command, key, message):
    """A mesh that is asked for is not replaced by another one."""
    result = on_one_device(folder, command, run, f"--model={run / 'checkpoints/2'}", "--scorer=exact_match", f"--config.{key}")
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


def test_a_later_start_of_a_run_evaluates_where_a_chosen_step_was_left_out(folder, config, tmp_path):
    """One that was stopped between a step and its evaluation makes it first."""
    from sft_jax.training.start import Start

    class Known:
        def knows(self, step):
            return True

    class Work:
        def read_lines(self, name):
            return []

    starts = {step: Start(None, {"step": step}, None).must_evaluate(config, Work(), ["held"], 10, Known()) for step in (1, 2, 3, 4, 9)}
    assert starts == {1: True, 2: True, 3: False, 4: True, 9: True}


def test_slices_are_the_set_cut_in_parts(folder, whole):
    result = whole.results["held"]
    by = whole.slices["held"]
    assert {column: set(parts) for column, parts in by.items()} == {"source": {"a", "b"}, "facts.long": {"true", "false"}}
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    described = whole.to_dict()["sets"]["held"]
    for parts in described["slices"].values():
        assert sum(part["tokens"] for part in parts.values()) == described["tokens"]
        weighted = sum(part["loss"] * part["tokens"] for part in parts.values()) / described["tokens"]
        assert weighted == pytest.approx(described["loss"])
        answers = sum(part["scores"]["token_f1"]["answers"] for part in parts.values())
        assert answers == described["scores"]["token_f1"]["answers"] == len(result.records)
    lines = {record["example"]["line"] for record in result.select(by["source"]["b"]).records}
    assert lines == {line for line, row in enumerate(rows, 1) if row["source"] == "b"}


def test_bits_per_byte_are_those_of_the_supervised_text(folder, whole):
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    size = sum(len(turn["content"].encode()) for row in rows for turn in row["messages"] if turn["role"] == "assistant")
    values = whole.results["held"].values()
    assert values["bits_per_byte"] == pytest.approx(values["loss"] * values["tokens"] / math.log(2) / size)


def test_choices_are_as_likely_as_their_tokens(folder, run, config, whole):
    """Each choice is trained on by itself in a set of its own, whose losses give its likelihood."""
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    chosen, sizes = [], []
    with open(folder / "choices.jsonl", "w") as file:
        for row in rows:
            for text in row["options"]:
                messages = [*row["messages"][:-1], {"role": "assistant", "content": text}]
                file.write(json.dumps({"messages": messages}) + "\n")
            chosen.append(row["options"].index(row["messages"][-1]["content"]))
            sizes.append(len(row["options"]))
    item = dataclasses.replace(config.data.eval[0], path=(str(folder / "choices.jsonl"),), supervise="last")
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=(item,)), eval=dataclasses.replace(config.eval, generate=0, slices=()))
    nll = evaluate(run, alone).results["held"].documents.nll
    at = np.cumsum([0, *sizes])
    right = [int(np.argmin(nll[start:stop]) == place) for start, stop, place in zip(at, at[1:], chosen)]
    assert [record["choice:options"] for record in whole.results["held"].records] == right and 0 < sum(right) < len(right)
    texts = [text for row in rows for text in row["options"]]
    per_byte = nll / [len(text.encode()) for text in texts]
    right = [int(np.argmin(per_byte[start:stop]) == place) for start, stop, place in zip(at, at[1:], chosen)]
    assert [record["choice_by_byte:options"] for record in whole.results["held"].records] == right


def test_intervals_hold_their_values(whole):
    described = whole.to_dict()["sets"]["held"]
    low, high = described["loss_interval"]
    assert low < described["loss"] < high
    for score in described["scores"].values():
        assert score["interval"][0] <= score["value"] <= score["interval"][1]
    json.dumps(whole.to_dict(), allow_nan=False)


def test_decoding_is_what_was_asked_for(run, config):
    plain = SamplingConfig()
    answers = [
        [record["generation"] for record in evaluate(run, with_eval(config, sampling=drawn, **changes)).records()]
        for drawn, changes in ((plain, {"max_new_tokens": 5, "stop": ()}), (plain, {"stop": ("a",)}))
    ]
    tokenizer = load_tokenizer(run / "export")
    assert all(len(tokenizer.encode(text)) <= 6 for text in answers[0]) and not any("a" in text for text in answers[1])


@pytest.mark.parametrize(
    ("column", "message"), [("sourc", "no row has the column 'sourc'; did you mean 'source'"), ("facts.short", "no row has")]
)
def test_a_column_that_is_not_there_is_named(run, config, column, message):
    with pytest.raises(UserError, match=message):
        evaluate(run, with_eval(config, slices=(column,)))


@pytest.mark.parametrize(
    ("scorer", "message"), [("choice:number", r"held_out.jsonl:\d+: the column 'number' must hold a list"), ("choice:nothing", "'nothing'")]
)
def test_choices_that_are_none_are_named_by_row(run, config, scorer, message):
    asked = dataclasses.replace(config, eval=dataclasses.replace(config.eval, scorers=(scorer,)))
    with pytest.raises(UserError, match=message):
        evaluate(run, asked)


@pytest.mark.parametrize(
    ("changes", "same"),
    [({"temperature": 2.0}, False), ({"temperature": 2.0, "min_p": 1.0}, True),
     *slow(({}, True), ({"temperature": 2.0, "top_k": 1}, True), ({"temperature": 2.0, "top_p": 1e-6}, True), ({"repetition_penalty": 9.0}, False))],
)  # fmt: skip
def test_options_of_sampling_reach_the_generator(run, config, opened, changes, same):
    """Each option that leaves one token gives the greedy answers, whatever the temperature."""
    assert (opened(SamplingConfig(**changes)) == opened(SamplingConfig())) == same


def test_the_seed_reaches_the_generator(opened):
    drawn = [opened(SamplingConfig(temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.fixture(scope="module")
def opened(run, config):
    """What the model of the run answers, by how it is drawn; it is read once."""
    mesh = make_mesh(1, -1, 1)
    decoder, data = open_decoder(Subject(str(run)), config, mesh), open_held_out(Subject(str(run)), config, lambda line: None)
    graphdef, state = split_model(decoder)

    def answers(drawn):
        asked = with_eval(config, sampling=drawn, stop=(), slices=(), scorers=("exact_match",))
        evaluator = Evaluator(asked, data, graphdef, make_eval_step(graphdef, mesh), mesh, 8, decoder.source)
        return [record["generation"] for record in evaluator.evaluate(state)["held"].records]

    return answers


def test_a_checkpoint_is_named_by_its_folder(run):
    assert run_and_step(run / "checkpoints" / "2") == (str(run), 2)
    assert run_and_step(run) == (str(run), None) and run_and_step("org/2") == ("org/2", None)


def test_a_step_that_is_not_there_is_named_with_those_that_are(run, config):
    with pytest.raises(UserError, match="no checkpoint of step 3; there are 2, 4"):
        evaluate(run, config, step=3)
