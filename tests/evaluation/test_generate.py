"""Most tests use the same four prompts, so that they share a few compiled programs."""

import jax
import numpy as np
import pytest
from slow_values import slow
from tiny_models import random_decoder, torch_model, twin

from sft_jax.errors import UserError
from sft_jax.evaluation import decoding
from sft_jax.evaluation.decoding import round_up
from sft_jax.evaluation.generate import draw_numbers, generate, generate_ids
from sft_jax.evaluation.sampling import sampling
from sft_jax.evaluation.slots import Generation, NumberedPrompt, Slots
from sft_jax.hf.load import load

NEW = 24  # tokens: with the prompts past every window of the tiny models, which is 8
DRAW = sampling(1.0, top_p=0.95)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 96, size).tolist() for size in (3, 20, 1, 9)]


@pytest.fixture(scope="module")
def decoder():
    return random_decoder("mistral")  # every layer has a window


@pytest.fixture(scope="module")
def greedy(decoder, prompts):
    return generate_ids(decoder, prompts, (), NEW)


@pytest.fixture(scope="module")
def stories(assets):
    return load(assets / "models" / "stories260k")


def ids_of(answers):
    return [answer.ids for answer in answers]


@pytest.mark.parametrize("name", ["llama", "gemma3", *slow("mistral", "gemma2")])
def test_greedy_tokens_are_those_of_transformers(name, prompts):
    torch = pytest.importorskip("torch")
    got = ids_of(generate_ids(twin(name), prompts, (), NEW))
    for prompt, ids in zip(prompts, got, strict=True):
        expected = torch_model(name).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert ids == expected[0, len(prompt) :].tolist()


def test_greedy_text_of_a_trained_model_is_the_published_one(stories, assets):
    published = (assets / "reference" / "stories260k_greedy.txt").read_text()
    assert generate(*stories, [""], max_new_tokens=256)[0] + "\n" == published


def test_cached_decoding_equals_reading_everything_again(decoder, prompts, greedy):
    logits = jax.jit(lambda decoder, tokens: decoder(tokens))
    tokens = np.zeros((len(prompts), 48), np.int32)
    lengths = np.array([len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    rows = np.arange(len(prompts))
    for _ in range(NEW):  # attention is causal: what stands behind a row's last token has no influence
        tokens[rows, lengths] = np.asarray(logits(decoder, tokens))[rows, lengths - 1].argmax(-1)
        lengths += 1
    assert ids_of(greedy) == [tokens[r, len(p) : len(p) + NEW].tolist() for r, p in enumerate(prompts)]


def test_prompts_beside_it_and_the_batch_size_do_not_change_an_answer(decoder, prompts, greedy):
    assert [generate_ids(decoder, [prompts[i]], (), NEW)[0] for i in (0, 2)] == [greedy[0], greedy[2]]
    assert generate_ids(decoder, prompts, (), NEW, batch_size=3) == greedy
    assert generate_ids(decoder, prompts[::-1], (), NEW) == greedy[::-1]
    assert generate_ids(decoder, prompts[:3], (), NEW) == greedy[:3]


def test_a_prompt_read_in_chunks_gives_the_same_answer(decoder, prompts, greedy, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNKS", (8,))  # the prompt of 20 tokens takes three, past the window
    assert generate_ids(decoder, prompts, (), NEW) == greedy


def slots_of(decoder, prompts, options, seed):
    slots = Slots(decoder, len(prompts), max(map(len, prompts)), (), NEW, options, seed)
    slots.fill({slot: NumberedPrompt(ids, number) for slot, (ids, number) in enumerate(zip(prompts, draw_numbers(prompts)))})
    return slots


@pytest.mark.parametrize("options", [sampling(), DRAW], ids=["greedy", "drawn"])
def test_steps_of_any_size_give_the_same_tokens(decoder, prompts, options):
    whole = generate_ids(decoder, prompts, (), NEW, options=options, seed=3)
    slots, every = slots_of(decoder, prompts, options, 3), range(len(prompts))
    seen, steps = [slots.answers(every)], 0
    while not slots.done().all():
        slots.advance(1 + steps % 3)
        seen.append(slots.answers(every))
        steps += 1
    assert seen[-1] == whole and steps > 5
    for before, after in zip(seen, seen[1:]):
        for old, new in zip(before, after, strict=True):
            assert new.ids[: len(old.ids)] == old.ids


PENALISED = pytest.param(sampling(1.0, repetition_penalty=1.3), marks=pytest.mark.slow, id="penalised")


@pytest.mark.parametrize("options", [pytest.param(sampling(), id="greedy"), pytest.param(DRAW, id="drawn"), PENALISED])
def test_slots_that_are_filled_again_give_the_answers_of_one_prompt_at_a_time(decoder, options):
    """Sixteen slots, two of which are filled at once; answers end at different lengths, by stop ids and at the limit."""
    rng = np.random.default_rng(1)
    many = [rng.integers(0, 96, int(size)).tolist() for size in rng.integers(1, 16, 40)]
    stops = (7, 21, 60, 33)
    together = generate_ids(decoder, many, stops, NEW, options=options, seed=2, batch_size=16)
    assert len({len(answer.ids) for answer in together}) > 4 and {answer.finished for answer in together} == {True, False}
    alone = Slots(decoder, 1, 15, stops, NEW, options, 2)
    for ids, answer, number in list(zip(many, together, draw_numbers(many), strict=True))[::3]:
        alone.fill({0: NumberedPrompt(ids, number)})
        alone.advance(NEW)
        assert alone.answers([0]) == [answer]


def test_a_slot_is_filled_while_the_others_go_on(decoder, prompts, greedy):
    slots = slots_of(decoder, prompts, sampling(), 0)
    slots.advance(10)
    slots.fill({2: NumberedPrompt(prompts[0], 0)})
    assert slots.done().tolist() == [False] * 4 and len(slots.answers([2])[0].ids) == 1
    slots.advance(NEW)
    assert slots.answers(range(4)) == [greedy[0], greedy[1], greedy[0], greedy[3]]


def test_decoding_ends_when_enough_slots_are_done(decoder, prompts, greedy):
    slots = slots_of(decoder, prompts, sampling(), 0)
    slots.advance(5)
    slots.end([1])
    slots.advance(NEW, wanted=1)
    assert [len(answer.ids) for answer in slots.answers(range(4))] == [6] * 4
    slots.advance(NEW, wanted=2)
    assert slots.answers([0, 2, 3]) == [greedy[0], greedy[2], greedy[3]]
    assert slots.answers([1]) == [Generation(greedy[1].ids[:6], True)]


def test_an_answer_ends_before_its_first_stop_id(decoder, prompts, greedy):
    stops = [greedy[0].ids[5], greedy[1].ids[0]]
    expected = []
    for answer in greedy:
        place = next((i for i, token in enumerate(answer.ids) if token in stops), None)
        expected.append(Generation(answer.ids[:place], place is not None))
    assert expected[1] == Generation([], True) and any(answer.ids and answer.finished for answer in expected)
    assert generate_ids(decoder, prompts, stops, NEW) == expected


def test_a_stop_id_right_at_the_limit_counts_as_finished(decoder, prompts, greedy):
    ids = greedy[0].ids
    place = next(i for i in range(len(ids) - 1, 0, -1) if ids.index(ids[i]) == i)
    assert generate_ids(decoder, prompts, [ids[place]], place + 1)[0] == Generation(ids[:place], True)
    assert generate_ids(decoder, prompts, [ids[place]], place)[0] == Generation(ids[:place], False)


def test_draws_depend_on_the_seed_and_the_prompt_only(decoder, prompts):
    draw = lambda prompts, seed, **rest: ids_of(generate_ids(decoder, prompts, (), NEW, options=DRAW, seed=seed, **rest))  # noqa: E731
    first = draw(prompts, 1)
    assert draw(prompts, 1) == first == draw(prompts, 1, batch_size=2)
    assert draw(prompts[:3], 1) == first[:3] and draw(prompts[::-1], 1) == first[::-1]
    assert all(a != b for a, b in zip(draw(prompts, 2), first, strict=True))
    same = draw([prompts[1], prompts[0], prompts[1], prompts[1]], 1)
    assert same[:2] == [first[1], first[0]]
    assert len({tuple(ids) for ids in (same[0], same[2], same[3])}) == 3  # equal prompts draw each for themselves


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.4}, {"repetition_penalty": 0.8}])
def test_penalised_greedy_tokens_are_those_of_transformers(prompts, options):
    torch = pytest.importorskip("torch")
    got = ids_of(generate_ids(twin("llama"), prompts, (), NEW, options=sampling(**options)))
    assert got != ids_of(generate_ids(twin("llama"), prompts, (), NEW))
    for prompt, ids in zip(prompts, got, strict=True):
        expected = torch_model("llama").generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
        assert ids == expected[0, len(prompt) :].tolist()


def test_an_answer_ends_before_its_first_stop_string(stories):
    prompts = ["Once upon a time", "Lily", "Tom and", "The dog"]
    whole = generate(*stories, prompts, max_new_tokens=60)
    stop = ["\n", whole[0][12:17], whole[1][-9:]]
    expected = [text[: min(text.find(s) for s in stop if s in text)] if any(s in text for s in stop) else text for text in whole]
    assert expected[0] != whole[0] and expected[1] != whole[1]
    for batch_size in (1, 4):
        assert generate(*stories, prompts, max_new_tokens=60, stop=stop, batch_size=batch_size) == expected


def test_drawn_tokens_follow_the_softmax_of_the_logits(decoder):
    """Pearson's chi-square of the first and of the second token at a fixed seed, rare tokens taken together."""
    prompt, draws = [4, 9, 2], 2048
    options, read = sampling(0.7, top_k=20), jax.jit(lambda decoder, tokens: decoder(tokens))
    answers = generate_ids(decoder, [prompt] * draws, (), 2, options=options, seed=7, batch_size=draws)
    answers = np.array(ids_of(answers))
    common = np.bincount(answers[:, 0]).argmax()
    for context, tokens in ((prompt, answers[:, 0]), ([*prompt, common], answers[answers[:, 0] == common, 1])):
        padded = np.array([context + [0] * (4 - len(context))])
        logits = np.asarray(read(decoder, padded))[0, len(context) - 1].astype(np.float64)
        top = np.argsort(-logits)[:20]
        weights = np.exp((logits[top] - logits[top[0]]) / 0.7)
        expected = len(tokens) * weights / weights.sum()
        counts = np.bincount(tokens, minlength=96)[top]
        assert counts.sum() == len(tokens) > 100
        rare = expected < 5
        expected = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(counts[~rare], counts[rare].sum())
        degrees = len(expected) - 1
        # 0.999 quantile by the approximation of Wilson and Hilferty (1931)
        quantile = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3
        assert degrees >= 3 and ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum() < quantile


def test_prompts_of_many_lengths_share_one_program(decoder):
    before = decoding.fill._cache_size(), decoding.advance._cache_size()
    rng = np.random.default_rng(0)
    for size in range(13, 17):
        for rest in ({}, {"seed": size}):
            generate_ids(decoder, [rng.integers(0, 96, size).tolist()] * 2, range(size % 8), 31 - size, **rest)
    after = decoding.fill._cache_size(), decoding.advance._cache_size()
    assert [a - b for a, b in zip(after, before, strict=True)] == [1, 1]


def test_sizes_are_rounded_up_by_at_most_half():
    sizes = [round_up(size) for size in range(1, 513)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 13
    assert all(size <= rounded <= max(1.5 * size, 8) for size, rounded in enumerate(sizes, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"),
     ({"batch_size": 0}, "batch_size"), ({"min_p": 2.0}, "min_p"), ({"stop": [""]}, "stop"), ({"stop": "text"}, "stop"),
     ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"prompts": "one text"}, "prompts"),
     ({"prompts": ["a", 3]}, r"prompts\[1\]"), ({"prompts": [[1, 512]]}, "512")],
)  # fmt: skip
def test_bad_arguments_are_named(stories, arguments, message):
    with pytest.raises(UserError, match=message):
        generate(*stories, **{"prompts": ["Once"], "max_new_tokens": 2, **arguments})


def test_no_prompts_give_no_answers(stories):
    assert generate(*stories, []) == []
