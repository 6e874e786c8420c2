"""The adapter of lm-evaluation-harness: its answers against the harness's own adapter of transformers, and a local task."""

from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sft_jax[lm-eval]'")

from benchmark_task import write_task

from sft_jax.errors import UserError
from sft_jax.evaluation.harness import Benchmarks, HarnessModel, find_tasks, run_benchmarks
from sft_jax.hf.load import load

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. "


def asked(*arguments):
    return [SimpleNamespace(args=item) for item in arguments]


@pytest.fixture(scope="module")
def model(assets):
    return HarnessModel(*load(assets / "models" / "stories260k"), batch_size=4)


@pytest.fixture(scope="module")
def theirs(assets):
    """The harness's own adapter, of transformers, on the same files."""
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(assets / "models" / "stories260k"), device="cpu", batch_size=1, dtype="float32", add_bos_token=True)


PAIRS = [("Once upon a time", ", there was"), ("The cat sat on the", " mat"), ("", "Once upon"), ("She said ", "hello"), (STORY * 14, "It was Lily.")]


def test_likelihoods_are_those_of_the_harness_own_adapter(model, theirs):
    got, expected = model.loglikelihood(asked(*PAIRS)), theirs.loglikelihood(asked(*PAIRS))
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=2e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected] and {greedy for _, greedy in got} == {True, False}


def test_likelihoods_of_whole_texts_are_those_of_the_harness_own_adapter(model, theirs, monkeypatch):
    monkeypatch.setattr(theirs, "add_bos_token", False)  # else it has BOS follow the BOS before the text, and counts it
    texts = [(STORY,), (STORY * 14,)]  # the second one in windows
    assert len(model.tok_encode(texts[1][0])) > model.max_length == theirs.max_length
    assert model.loglikelihood_rolling(asked(*texts)) == pytest.approx(theirs.loglikelihood_rolling(asked(*texts)), rel=1e-4)


def test_generation_is_that_of_the_harness_own_adapter(model, theirs):
    requests = asked(("Once upon a time", {"until": ["."], "max_gen_toks": 40}), ("Tom had a", {"until": ["\n", "big"], "max_gen_toks": 24}))
    got = model.generate_until(requests)
    expected = theirs.generate_until(requests)  # texts of the new tokens alone, which lose the space before them
    assert [text.lstrip() for text in got] == [text.lstrip() for text in expected] and len(got[0]) > 20 and "." not in got[0]


def test_sampling_follows_the_seed_and_unknown_settings_are_named(model):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = lambda **rest: asked(*((text, {**settings, **rest}) for text in ("Lily", "The", "One day", "A")))  # noqa: E731
    first, again = (model.generate_until(requests()) for _ in range(2))
    assert first == again != model.generate_until(requests(do_sample=False))
    with pytest.raises(UserError, match="num_beams"):
        model.generate_until(asked(("Lily", {**settings, "num_beams": 4})))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"text": "Once upon a time, there was a little", "choices": [" girl", " xylophone"], "label": 0},
        {"text": "She was very happy and", "choices": [" quantum", " smiled"], "label": 1},
        {"text": "One day, Tom went to the", "choices": [" park", " zqx"], "label": 1},
    ]
    return write_task(folder, "stories", rows)


def run(model, asked):
    return run_benchmarks(model, asked, find_tasks(asked), log=print)


def test_a_local_task_is_scored(model, task):
    found = run(model, Benchmarks((str(task),)))
    assert found["stories"]["acc,none"] == pytest.approx(2 / 3) and found["stories"]["examples"] == 3
    assert found["stories"].keys() == {"acc,none", "acc_stderr,none", "examples"}
    assert run(model, Benchmarks((str(task),), limit=2))["stories"]["acc,none"] == 1.0


def test_a_file_of_a_task_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no file .*none.yaml"):
        find_tasks(Benchmarks((str(tmp_path / "none.yaml"),)))


@pytest.mark.slow
def test_a_task_that_the_harness_has_not_is_named():
    with pytest.raises(UserError, match="has no task no_such_task"):
        find_tasks(Benchmarks(("no_such_task",)))
