"""Faults that show beside other rows: duplicates, conflicts, overlap, odd languages, lengths and JSON."""

import itertools
import json

import numpy as np
import pytest
from doctor_data import WORDS, changed, configure, examine, found, row, rows, sentence
from hypothesis import given
from hypothesis import strategies as st
from row_files import lines, write

from sft_jax.doctor.check import diagnose
from sft_jax.doctor.facts import FactFinder, Setup
from sft_jax.doctor.near_duplicates import candidate_pairs, jaccard
from sft_jax.doctor.set_checks import first_of_equals
from sft_jax.doctor.texts import hash_runs, hash_words, words


def test_rows_without_a_fault_have_none(tmp_path):
    diagnosis = examine(tmp_path, rows(80), rows(20, 100))
    assert {kind: result.findings for kind, result in diagnosis.kinds.items() if result.rows} == {}
    assert diagnosis.sets == {"data.train": 80, "data.eval": 20} and diagnosis.notes == ()


def test_duplicates_are_those_after_the_first(tmp_path):
    spaced = {key: f" {value}\n" for key, value in row(3).items()}
    other_answer = row(4, completion=sentence("other"))
    diagnosis = examine(tmp_path, [*rows(10), row(3), spaced, row(7), other_answer], [row(5)])
    file = tmp_path / "train.jsonl"
    assert found(diagnosis, "duplicate") == {
        11: f"is the same as {file}:4",
        12: f"is the same as {file}:4",
        13: f"is the same as {file}:8",
    }
    assert diagnosis.kinds["duplicate"].rows == 3  # the held-out row is none of them: it is an overlap
    assert set(found(diagnosis, "near_duplicate")) == set()


def test_the_same_prompt_with_another_answer_conflicts(tmp_path):
    first = row(4)
    train = [
        *rows(10),
        row(4, completion=sentence("other")),
        row(5, completion=row(5)["completion"].upper()),
        {**first, "system": "Be brief."},
    ]
    diagnosis = examine(tmp_path, train)
    (detail,) = found(diagnosis, "conflicting_answers").values()
    assert list(found(diagnosis, "conflicting_answers")) == [11]
    assert f"and {tmp_path / 'train.jsonl'}:5 the same prompt with " in detail and sentence("other")[:20] in detail


def test_case_and_white_space_of_a_prompt_make_no_other_one(tmp_path):
    train = [*rows(10), row(4, prompt=row(4)["prompt"].upper() + "  \n", completion=sentence("other"))]
    assert list(found(examine(tmp_path, train), "conflicting_answers")) == [11]
    train = [*rows(10), row(4, prompt=row(4)["prompt"] + "?!", completion=sentence("other"))]  # punctuation may be what is asked about
    assert found(examine(tmp_path, train), "conflicting_answers") == {}


def test_the_same_texts_in_other_formats_are_duplicates(tmp_path):
    def as_chat(pair):
        return {"messages": [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["completion"]}]}

    paths = [write(tmp_path, "a.jsonl", lines(*rows(10))), write(tmp_path, "b.jsonl", lines(as_chat(row(20)), as_chat(row(3))))]
    config = configure(tmp_path, rows(1), train={"a": {"path": paths[0]}, "b": {"path": paths[1]}})
    diagnosis = diagnose(config.data)
    assert [(each.set, each.line, each.detail) for each in diagnosis.findings["duplicate"]] == [
        ("data.train.b", 2, f"is the same as {paths[0]}:4")
    ]
    assert diagnosis.kinds["near_duplicate"].rows == 0


def test_near_duplicates_are_verified_on_the_texts(tmp_path):
    long = row(1, completion=sentence("long", 200))
    near = {**long, "completion": changed(long["completion"], 5)}
    far = {**long, "prompt": row(2)["prompt"], "completion": changed(long["completion"], 40)}
    diagnosis = examine(tmp_path, [long, *rows(40, 10), near, far])
    assert list(found(diagnosis, "near_duplicate")) == [42]
    one, other = (
        {tuple(parts[at : at + 3]) for at in range(len(parts) - 2)}
        for parts in (words(" ".join(each.values())) for each in (long, near))
    )
    assert (
        found(diagnosis, "near_duplicate")[42]
        == f"is nearly {tmp_path / 'train.jsonl'}:1, with a similarity of {jaccard(one, other):.2f}"
    )


def test_rows_that_say_something_else_are_no_near_duplicates(tmp_path):
    text = sentence("document", 150)
    train = [
        {"prompt": f"{text} What is first?", "completion": "It is the stone."},  # one document, several questions
        {"prompt": f"{text} What is last?", "completion": "Everybody knows a kettle."},
        {
            "prompt": f"{sentence('sum', 40)} How much is 12 + 30?",
            "completion": f"{sentence('steps', 40)} So it is 42.",
        },  # another exercise
        {"prompt": f"{sentence('sum', 40)} How much is 12 + 31?", "completion": f"{sentence('steps', 40)} So it is 43."},
        {"prompt": "Is 5 > 3?", "completion": "Yes."},  # short ones with the same words
        {"prompt": "Is 5 < 3?", "completion": "Yes."},
        {"prompt": "Who are you, if I may ask?", "completion": sentence("identity", 60)},  # one answer to several questions
        {"prompt": "What is the name of this thing?", "completion": sentence("identity", 60)},
    ]
    assert found(examine(tmp_path, train + rows(30)), "near_duplicate") == {}


def test_short_rows_are_near_duplicates_where_their_words_are_the_same(tmp_path):
    train = [
        {"prompt": "How are you?", "completion": "Fine, thanks."},
        *rows(20),
        {"prompt": "how are you", "completion": "Fine thanks!"},
    ]
    assert found(examine(tmp_path, train), "near_duplicate") == {22: f"has the same words as {tmp_path / 'train.jsonl'}:1"}


def test_every_near_duplicate_of_a_cluster_is_beside_a_row_that_is_kept(tmp_path):
    """A chain, in which each row is near the one before it and the last is far from the first."""
    chain = [row(1, completion=sentence("long", 100))]
    for step in range(12):
        parts = chain[-1]["completion"].split()
        parts[8 * step] = f"changed{chr(97 + step)}"
        chain.append({**chain[-1], "completion": " ".join(parts)})
    diagnosis = examine(tmp_path, chain)
    flagged = found(diagnosis, "near_duplicate")
    texts = [words(each["prompt"] + " " + each["completion"]) for each in chain]
    sets = [{tuple(text[at : at + 3]) for at in range(len(text) - 2)} for text in texts]
    kept = [number for number in range(len(chain)) if number + 1 not in flagged]
    assert len(kept) > 1 and flagged
    for line in flagged:
        assert any(jaccard(sets[line - 1], sets[other]) >= 0.8 for other in kept if other < line - 1)
    for one, other in itertools.combinations(kept, 2):
        assert jaccard(sets[one], sets[other]) < 0.85  # those at the threshold may be missed


def test_candidate_pairs_against_all_pairs():
    finder = FactFinder(Setup(()))
    texts = []
    for seed in range(150):
        base = sentence(seed // 3, 60)
        texts.append(changed(base, seed % 3, seed))
    hashes = [hash_words(words(text)) for text in texts]
    signatures = np.stack([finder._signature(each) for each in hashes])
    later, earlier = candidate_pairs(signatures, np.ones(len(texts), bool))
    candidates = set(zip(later.tolist(), earlier.tolist(), strict=True))
    sets = [set(hash_runs(each, 3).tolist()) for each in hashes]
    similar = {(b, a) for a, b in itertools.combinations(range(len(texts)), 2) if jaccard(sets[a], sets[b]) >= 0.8}
    assert len(similar) > 20 and similar <= candidates
    assert all(one > other and jaccard(sets[one], sets[other]) > 0.45 for one, other in candidates)
    nothing = np.zeros(len(texts), bool)
    assert [len(part) for part in candidate_pairs(signatures, nothing)] == [0, 0]


def test_a_phrase_that_all_rows_have_makes_no_square_of_pairs():
    count = 3000
    signatures = np.random.default_rng(0).integers(0, 2**32, (count, 80), dtype=np.uint32)
    signatures[:, :5] = 7  # all share a band
    assert len(candidate_pairs(signatures, np.ones(count, bool))[0]) == 0
    signatures[:] = 7
    assert len(candidate_pairs(signatures, np.ones(count, bool))[0]) <= 5 * count


@given(st.lists(st.integers(0, 5)))
def test_first_of_equals(keys):
    expected = [keys.index(key) if key else place for place, key in enumerate(keys)]
    assert first_of_equals(np.asarray(keys, np.uint64)).tolist() == expected


@given(st.lists(st.sampled_from(WORDS[:4]), max_size=30), st.integers(1, 13))
def test_runs_are_equal_where_their_words_are(parts, size):
    runs = [tuple(parts[at : at + size]) for at in range(len(parts) - size + 1)]
    hashes = hash_runs(hash_words(parts), size)
    assert len(hashes) == len(runs)
    for one, other in itertools.combinations(range(len(runs)), 2):
        assert (hashes[one] == hashes[other]) == (runs[one] == runs[other])


def test_what_cannot_be_read_is_found_with_its_reason(tmp_path):
    content = lines(*rows(10)) + "{not json\n" + lines({"prompt": "x"})
    config = configure(tmp_path, rows(1))
    (tmp_path / "train.jsonl").write_text(content)
    details = found(diagnose(config.data), "unreadable")
    assert list(details) == [11, 12]
    assert details[11].startswith("is not valid JSON") and details[12].startswith("field 'completion' is missing")


ENGLISH = (
    "The weather was so fine that all of them went to the lake in the afternoon, "
    "and nobody came back before it was dark. That was number {}."
)
FRENCH = "Il faisait si beau que tout le monde est allé au bord du lac cet après-midi, et personne n'est rentré avant la nuit tombée."
CHINESE = "今天天气非常好，所以大家下午都去了湖边散步，一直到天黑以后才慢慢地走回家里去吃晚饭。"
ARABIC = "كان الطقس جميلا جدا لدرجة أن الجميع ذهبوا إلى البحيرة في فترة ما بعد الظهر ولم يعد أحد قبل حلول الظلام في ذلك اليوم الطويل."
def test_a_row_in_another_language_than_its_set_is_found(tmp_path):
    train = [row(seed, completion=ENGLISH.format(seed)) for seed in range(40)]
    train += [row(41, completion=FRENCH), row(42, completion=CHINESE), row(43, completion=ARABIC)]
    train += [
        row(44, prompt="Translate the sentence into French.", completion=FRENCH),
        row(45, prompt="Say it in Chinese.", completion=CHINESE),
    ]
    details = found(examine(tmp_path, train), "wrong_language")
    assert list(details) == [41, 42, 43]
    assert details[41].startswith("is in 'fr', the set in 'en': \"Il faisait")


@pytest.mark.parametrize("text", [CHINESE, ARABIC, FRENCH])
def test_a_set_in_any_language_is_in_its_language(tmp_path, text):
    train = [{"prompt": f"{text} ({seed})", "completion": f"{text} 🎉 {seed}."} for seed in range(40)]
    diagnosis = examine(tmp_path, train)
    for kind in ("wrong_language", "mojibake", "cut_answer", "one_word_answer", "near_duplicate"):
        assert found(diagnosis, kind) == {}, kind


def test_a_set_in_two_languages_has_no_wrong_one(tmp_path):
    train = [row(seed, completion=ENGLISH.format(seed) if seed % 4 else f"{FRENCH} {seed}") for seed in range(60)]
    assert found(examine(tmp_path, train), "wrong_language") == {}
    details = found(examine(tmp_path, [*train, row(70, completion=CHINESE)]), "wrong_language")
    assert list(details) == [61] and details[61].startswith("is in 'zh', the set in 'en' and 'fr': ")


def test_answers_that_are_no_json_in_a_set_of_json(tmp_path):
    train = [row(seed, completion=json.dumps({"command": sentence(seed, 8), "value": seed})) for seed in range(30)]
    train += [row(40, completion='{"command": "stop"'), row(41, completion="Of course! Here you are.")]
    details = found(examine(tmp_path, train), "invalid_json")
    assert list(details) == [31, 32] and details[31] == '"{"command": "stop"", where 93.8% of the set are JSON'
    assert (
        found(examine(tmp_path, [*rows(30), row(40, completion='{"a": 1'), row(41, completion='{"a": 1}')]), "invalid_json")
        == {}
    )


def test_a_code_block_of_json_is_json_but_among_objects_without_one(tmp_path):
    train = [row(seed, completion=f'```json\n{{"value": {seed}}}\n```') for seed in range(30)]
    train += [row(40, completion='```json\n{"value": ```'), row(41, completion='{"value": NaN}'), row(42, completion='{"value": 1}')]
    assert list(found(examine(tmp_path, train), "invalid_json")) == [31, 32]
    train = [row(seed, completion=json.dumps({"value": seed})) for seed in range(30)]
    train += [row(40, completion='```json\n{"value": 1}\n```'), row(41, completion='"nothing"'), row(42, completion='{"value": Infinity}')]
    assert list(found(examine(tmp_path, train), "invalid_json")) == [31, 33]


def test_earlier_answers_that_are_no_json_are_found_among_those_that_are(tmp_path):
    def chat(seed, first, last):
        user = {"role": "user", "content": row(seed)["prompt"]}
        return {"messages": [user, {"role": "assistant", "content": first}, user, {"role": "assistant", "content": last}]}

    train = [chat(seed, f'{{"a": {seed}}}', f'{{"b": {seed}}}') for seed in range(20)]
    train += [chat(30, '{"a": ', '{"b": 3}')]
    assert found(examine(tmp_path, train), "invalid_json") == {21: "an earlier answer is none, where 95.2% of the set are JSON"}
    asked_back = [chat(seed, "For which of them?", f'{{"b": {seed}}}') for seed in range(20)]
    assert found(examine(tmp_path, [*asked_back, chat(30, '{"a": 1}', "Sorry?")]), "invalid_json") == {
        21: '"Sorry?", where 95.2% of the set are JSON'
    }


def test_a_sentence_without_a_mark_is_cut_where_all_others_have_one(tmp_path):
    cut = "Photosynthesis is the process by which green plants use sunlight to make"
    details = found(examine(tmp_path, [*rows(30), row(40, completion=cut)]), "cut_answer")
    assert details == {31: 'ends with "...is is the process by which green plants use sunlight to make" without a mark, which 96.8% of the set have'}
    without = [row(seed, completion=sentence(seed).rstrip(".")) for seed in range(30)]
    assert found(examine(tmp_path, [*without, row(40, completion=cut)]), "cut_answer") == {}


def test_one_word_answers_count_where_the_set_has_longer_ones(tmp_path):
    assert found(examine(tmp_path, [*rows(30), row(40, completion="Yes.")]), "one_word_answer") == {31: 'the answer is "Yes."'}
    labels = [row(seed, completion=("positive", "negative", "72")[seed % 3]) for seed in range(30)]
    diagnosis = examine(tmp_path, [*labels, *rows(20, 100)])
    assert found(diagnosis, "one_word_answer") == {} and diagnosis.kinds["one_word_answer"].usual == ("data.train",)


def test_rows_far_longer_than_their_set_are_noted(tmp_path):
    train = [row(seed, completion=sentence(seed, 20 + seed % 30)) for seed in range(100)]
    details = found(
        examine(tmp_path, [*train, row(200, completion=sentence("long", 2000)), row(201, completion=sentence("x", 100))]),
        "length_outlier",
    )
    assert list(details) == [101] and " characters, where the median of the set is " in details[101]
    spread = [row(seed, completion=sentence(seed, 5 * 3 ** (seed % 6))) for seed in range(100)]
    assert found(examine(tmp_path, spread), "length_outlier") == {}


def test_plain_texts_are_looked_at(tmp_path):
    train = [{"text": sentence(seed, 40)} for seed in range(20)]
    train += [train[3], {"text": changed(train[4]["text"], 1)}, {"text": sentence(50, 40) + "<|im_end|>"}]
    diagnosis = examine(tmp_path, train, [{"text": train[7]["text"]}])
    kinds = {kind: list(found(diagnosis, kind)) for kind, result in diagnosis.kinds.items() if result.rows}
    assert kinds == {"duplicate": [21], "near_duplicate": [22], "template_markup": [23], "overlap": [8]}


@given(st.text())
def test_words_are_the_same_by_either_pattern(text):
    """ASCII takes a faster pattern: a character beyond it may change nothing about the words before it."""
    assert words(f"{text} ä") == [*words(text), "ä"]


@given(st.lists(st.sampled_from([3, 5, 13, 14])), st.integers(0, 4))
def test_words_do_not_depend_on_case_width_or_punctuation(parts, seed):
    text = " ".join(f"word{part}" for part in parts)
    assert (
        words(text)
        == words(text.upper())
        == words(text.replace(" ", ", "))
        == words(text.translate({ord("w"): "ｗ"}))
        == text.split()
    )


def test_rows_that_differ_in_calls_are_no_duplicates(tmp_path):
    def calls(city):
        turn = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": city}}]}
        return {"messages": [{"role": "user", "content": "How is it there?"}, turn]}

    rows = [calls("Rome"), calls("Oslo"), calls("Rome")]
    assert list(found(diagnose(configure(tmp_path, rows).data), "duplicate")) == [3]


def test_rows_of_tokens_are_compared_as_they_are(tmp_path):
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 4]}, {"input_ids": [1, 2, 3]}]
    diagnosis = diagnose(configure(tmp_path, rows).data)
    assert list(found(diagnosis, "duplicate")) == [3]
    assert {kind for kind, result in diagnosis.kinds.items() if result.rows} == {"duplicate"}
