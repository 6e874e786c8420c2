import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILY_CONFIGS, random_decoder, torch_model, twin

from sft_jax.errors import UserError
from sft_jax.evaluation import decoding
from sft_jax.evaluation.decoding import round_up
from sft_jax.evaluation.generate import DecodingBatch, Generation, generate, generate_ids
from sft_jax.evaluation.sampling import sampling
from sft_jax.hf.load import load

NEW = 24  # tokens: with the prompts past every window of the tiny models, which is 8


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 96, size).tolist() for size in (3, 20, 1, 9)]


@pytest.fixture(scope="module")
def decoder():
    return random_decoder("gemma2")


@pytest.fixture(scope="module")
def stories(assets):
    return load(assets / "models" / "stories260k")


def ids_of(answers):
    return [answer.ids for answer in answers]


def greedy_without_cache(decoder, prompt, count):
    """Reads the whole sequence again for every token."""
    logits = jax.jit(lambda d, t: d(t))
    padded = np.zeros((1, len(prompt) + count), np.int32)
    padded[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        padded[0, at] = int(logits(decoder, padded)[0, at - 1].argmax())  # causal: what follows has no influence
    return padded[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
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


def test_cached_decoding_equals_reading_everything_again(decoder, prompts):
    expected = [greedy_without_cache(decoder, prompt, NEW) for prompt in prompts]
    assert ids_of(generate_ids(decoder, prompts, (), NEW)) == expected


def test_prompts_beside_it_and_the_batch_size_do_not_change_an_answer(decoder, prompts):
    together = generate_ids(decoder, prompts, (), NEW)
    assert [generate_ids(decoder, [prompt], (), NEW)[0] for prompt in prompts] == together
    assert generate_ids(decoder, prompts, (), NEW, batch_size=3) == together
    assert generate_ids(decoder, prompts[::-1], (), NEW) == together[::-1]


def test_a_prompt_read_in_chunks_gives_the_same_answer(decoder, prompts, monkeypatch):
    whole = generate_ids(decoder, prompts, (), NEW)
    monkeypatch.setattr(decoding, "MAX_CHUNK", 8)  # the prompt of 20 tokens takes three, past the window
    assert generate_ids(decoder, prompts, (), NEW) == whole


@pytest.mark.parametrize("options", [sampling(), sampling(1.0, top_p=0.9)])
def test_steps_of_any_size_give_the_same_tokens(decoder, prompts, options):
    whole = generate_ids(decoder, prompts, (), NEW, options=options, seed=3)
    batch = DecodingBatch(decoder, prompts, (), NEW, options, seed=3)
    seen, steps = [batch.answers()], 0
    while batch.running:
        batch.advance(1 + steps % 3)
        seen.append(batch.answers())
        steps += 1
    assert seen[-1] == whole and steps > 5
    for before, after in zip(seen, seen[1:]):
        for old, new in zip(before, after, strict=True):
            assert new.ids[: len(old.ids)] == old.ids


def test_an_answer_ends_before_its_first_stop_id(decoder, prompts):
    full = generate_ids(decoder, prompts, (), NEW)
    stops = [full[0].ids[5], full[1].ids[0]]
    expected = []
    for answer in full:
        place = next((i for i, token in enumerate(answer.ids) if token in stops), None)
        expected.append(Generation(answer.ids[:place], place is not None))
    assert expected[1] == Generation([], True) and 0 < len(expected[0].ids) <= 5
    assert generate_ids(decoder, prompts, stops, NEW) == expected


def test_a_stop_id_right_at_the_limit_counts_as_finished(decoder, prompts):
    full = generate_ids(decoder, prompts[:1], (), NEW)[0].ids
    place = full.index(full[6])
    assert generate_ids(decoder, prompts[:1], [full[6]], place + 1) == [Generation(full[:place], True)]
    if place:
        assert generate_ids(decoder, prompts[:1], [full[6]], place) == [Generation(full[:place], False)]


def test_draws_depend_on_the_seed_and_the_place_only(decoder, prompts):
    draw = lambda seed, **rest: ids_of(generate_ids(decoder, prompts, (), NEW, options=sampling(1.0), seed=seed, **rest))  # noqa: E731
    first = draw(1)
    assert draw(1) == first
    assert draw(1, batch_size=3) == first
    assert all(a != b for a, b in zip(draw(2), first, strict=True))
    same = generate_ids(decoder, [prompts[0]] * 4, (), NEW, options=sampling(1.0), seed=1)
    assert len({tuple(answer.ids) for answer in same}) == 4  # equal prompts draw each for themselves


def test_drawn_tokens_follow_the_softmax_of_the_logits():
    """Pearson's chi-square of the first and of the second token at a fixed seed, rare tokens taken together."""
    decoder, prompt, draws = random_decoder("llama"), [4, 9, 2], 3000
    options = sampling(0.7, top_k=20)
    answers = np.array(ids_of(generate_ids(decoder, [prompt] * draws, (), 2, options=options, seed=7, batch_size=1024)))
    common = np.bincount(answers[:, 0]).argmax()
    for context, tokens in ((prompt, answers[:, 0]), ([*prompt, common], answers[answers[:, 0] == common, 1])):
        logits = np.asarray(decoder(jnp.asarray([context])))[0, -1].astype(np.float64)
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


def test_few_programs_are_compiled_for_many_lengths(decoder):
    before = decoding.start._cache_size(), decoding.advance._cache_size()
    rng = np.random.default_rng(0)
    for size in range(33, 44):
        generate_ids(decoder, [rng.integers(0, 96, size).tolist()] * (1 + size % 2), (5,), 50 - size)
    after = decoding.start._cache_size(), decoding.advance._cache_size()
    assert max(a - b for a, b in zip(after, before, strict=True)) <= 2  # one for each number of rows


def test_sizes_are_rounded_up_by_at_most_half():
    for size in range(8, 500):
        assert size <= round_up(size) <= 1.5 * size + 1
    assert len({round_up(size) for size in range(1, 513)}) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"), ({"batch_size": 0}, "batch_size"),
     ({"prompts": "one text"}, "prompts"), ({"prompts": [3]}, r"prompts\[0\]"), ({"prompts": ["a", []]}, r"prompts\[1\]"),
     ({"prompts": [[{"role": "user", "content": "a"}]]}, "no chat template"), ({"prompts": [[1, 512]]}, "512")],
)  # fmt: skip
def test_bad_arguments_are_named(stories, arguments, message):
    arguments = {"prompts": ["Once"], "max_new_tokens": 2, **arguments}
    with pytest.raises(UserError, match=message):
        generate(*stories, **arguments)


def test_texts_ids_and_chats_are_read_as_inference_feeds_them(stories):
    model, tokenizer = stories
    text = "Once upon a time"
    by_text = generate(model, tokenizer, [text], max_new_tokens=12)
    assert generate(model, tokenizer, [[1, *tokenizer.encode(text)]], max_new_tokens=12) == by_text  # 1 is BOS
    assert generate(model, tokenizer, [np.array([1, *tokenizer.encode(text)])], max_new_tokens=12) == by_text
    chat = [{"role": "user", "content": "Hi"}]
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    by_chat = generate(model, tokenizer, [chat], max_new_tokens=12, chat_template="chatml")
    assert by_chat == generate(model, tokenizer, [rendered], max_new_tokens=12)
    with pytest.raises(UserError, match=r"prompts\[0\].*role"):
        generate(model, tokenizer, [[{"content": "Hi"}]], chat_template="chatml")


def test_no_prompts_give_no_answers(stories):
    assert generate(*stories, []) == []
