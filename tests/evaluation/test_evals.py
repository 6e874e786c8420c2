import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from evaluation_sets import decoder_on, held_out
from flax import nnx
from synthetic_data import Plain, make_stream

from sft_jax.config_parsing import parse_config
from sft_jax.evaluation import decoding
from sft_jax.evaluation.evals import Evaluator
from sft_jax.evaluation.losses import evaluate_documents, evaluate_loss, supervised_bytes
from sft_jax.evaluation.step import DocumentLoss, make_eval_step
from sft_jax.hf.source import Source
from sft_jax.training.state import TrainState

CONFIG = {"model": {"path": "m"}, "data": {"train": "t", "eval": "e"}, "eval": {"generate": 3, "max_new_tokens": 8}}


def stream_of(examples):
    return make_stream(examples, max_length=48, max_segments=6, shuffle=False)


class Tokenizer:
    """A tokenizer whose text is the ids."""

    vocab_size, bos_id, eos_id, pad_id, chat_template = 96, None, 2, None, None
    special_tokens, added_tokens, plain_prefix = {}, {}, ()

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f" {i}" for i in ids)


@pytest.fixture(scope="module")
def run():
    """The pieces that a run gives an evaluator, and the state that it calls it with."""
    graphdef, params = nnx.split(decoder_on(None))
    state = TrainState(0, params, nnx.State({}), None, nnx.State({}))
    sets = {"first": stream_of(held_out(20)), "second": stream_of(held_out(30)[20:])}
    data = SimpleNamespace(eval=sets, tokenizer=Tokenizer())
    return graphdef, state, data, make_eval_step(graphdef)


def evaluator_of(run, config=CONFIG):
    graphdef, _, data, eval_step = run
    return Evaluator(parse_config(config), data, graphdef, eval_step, None, 4, Source("m", '{"eos_token_id": 5}', None))


def test_every_set_has_its_values_and_its_samples(run):
    evaluator = evaluator_of(run)
    results, records = evaluator(run[1], 7)
    assert list(results) == ["first", "second"] == list(dict.fromkeys(record["set"] for record in records))
    for name, values in results.items():
        loss = evaluate_loss(run[3], run[1], run[2].eval[name], 4)
        more = ("bits_per_byte", "exact_match", "intervals")
        assert values == {**loss, **{key: values[key] for key in more}} and values["intervals"].keys() == {"loss", "exact_match"}
        assert values["intervals"]["loss"][0] < loss["loss"] < values["intervals"]["loss"][1]
        own = [record for record in records if record["set"] == name]
        assert len(own) == 3 and {record["step"] for record in own} == {7}
        assert values["exact_match"] == np.mean([record["exact_match"] for record in own])
    assert results["first"]["loss"] != results["second"]["loss"] and results["first"]["examples"] == 20


def test_every_evaluation_asks_the_same_and_compiles_nothing_anew(run):
    evaluator = evaluator_of(run)
    first = evaluator(run[1], 0)
    programs = decoding.fill._cache_size(), decoding.advance._cache_size(), run[3]._cache_size()
    changed = run[1]._replace(params=jax.tree.map(lambda x: x * 1.5, run[1].params))
    second = evaluator(changed, 5)
    assert (decoding.fill._cache_size(), decoding.advance._cache_size(), run[3]._cache_size()) == programs
    asked = [[(r["set"], r["example"], r["prompt"], r["reference"]) for r in records] for _, records in (first, second)]
    assert asked[0] == asked[1]
    assert [r["generation"] for r in first[1]] != [r["generation"] for r in second[1]]
    assert first[0]["first"]["loss"] != second[0]["first"]["loss"]


def test_answers_stop_where_the_model_and_the_tokenizer_say(run):
    assert evaluator_of(run)._stop_ids == (2, 5)


def test_without_generation_there_are_no_samples(run):
    results, records = evaluator_of(run, {**CONFIG, "eval": {"generate": 0}})(run[1], 0)
    assert records == [] and "exact_match" not in results["first"]


def sums(total, weight, correct=0.0):
    return DocumentLoss(*(np.full((1, 1), value, np.float32) for value in (total, weight, correct)))


def one_a_row(count):
    return make_stream([Plain([1, 2], [0.0, 1.0])] * count, max_length=48, max_segments=1, shuffle=False)


def test_a_set_without_supervised_tokens_is_no_loss_of_zero(run):
    with pytest.raises(ValueError, match="no supervised token"):
        evaluate_loss(lambda state, batch: sums(0.0, 0.0), None, one_a_row(3), 1)


def test_sums_over_many_batches_lose_nothing(run):
    """2 ** 24 + 1 is no float32: sums in float32 would stop growing."""
    values = iter([sums(2.0**24, 2**24), *[sums(1.0, 1)] * 100])
    result = evaluate_documents(lambda state, batch: next(values), None, one_a_row(101), 1)
    assert result.weight.sum() == 2**24 + 100 and result.values()["loss"] == 1.0
    assert result.values()["perplexity"] == math.e and result.values()["examples"] == 101


@pytest.mark.parametrize(("total", "perplexity"), [(1e4, math.exp(700)), (math.nan, math.nan)])
def test_perplexity_of_a_hopeless_loss_is_a_number_and_that_of_nan_is_none(run, total, perplexity):
    values = evaluate_loss(lambda state, batch: sums(total, 1), None, one_a_row(1), 1)
    np.testing.assert_equal((values["loss"], values["perplexity"]), (total, perplexity))


def test_sums_of_documents_are_those_of_each_alone(run):
    """Packed rows in batches against one document a row; slices of a set add up to it."""
    alone = evaluate_documents(run[3], run[1], make_stream(held_out(20), max_length=48, max_segments=1, packing=False, shuffle=False), 20)
    packed = evaluate_documents(run[3], run[1], run[2].eval["first"], 3)
    for one, other in zip(alone[:3], packed[:3], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    tokens = [sum(weight > 0 for weight in example.weights[1:]) for example in held_out(20)]
    assert packed.tokens.tolist() == tokens == alone.tokens.tolist()
    parts = [packed.select(np.arange(7)), packed.select(np.arange(7, 20))]
    assert sum(part.nll.sum() for part in parts) == pytest.approx(packed.nll.sum())
    assert parts[0].values()["loss"] != parts[1].values()["loss"]


def test_bytes_are_those_of_the_supervised_text(run):
    stream = make_stream([Plain([1, 22, 3, 4, 55], [0.0, 1.0, 0.0, 2.0, 2.0]), Plain([7, 8], [1.0, 1.0])], max_length=48, shuffle=False)
    assert supervised_bytes(stream, Tokenizer()).tolist() == [len(" 22") + len(" 4 55"), len(" 8")]
    result = evaluate_documents(run[3], run[1], stream, 2, sizes=np.array([8, 2]))
    bits = result.nll.sum() / math.log(2)
    assert result.values()["bits_per_byte"] == pytest.approx(bits / (8 * 5 / 3 + 2 * 1))  # by the mean weight of a token
