import itertools
import json
import re
import string
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.errors import UserError
from sft_jax.evaluation.json_scores import leaves
from sft_jax.evaluation.scorers import SCORERS, find_scorers
from sft_jax.evaluation.scoring import Answer, Choice, score
from sft_jax.evaluation.text_scores import last_number, longest_common_subsequence, normalised, rouge_l, token_f1

PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "json_schema": "jsonschema"}


def scorer(spec):
    if (name := PACKAGES.get(spec.partition(":")[0])) is not None:
        pytest.importorskip(name)
    return find_scorers([spec], "eval.scorers")[spec]


def value(spec, generation, reference, **row):
    return score(scorer(spec), [Answer(generation, reference, row=row)]).of_each()[0]


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
# (scorer, generation, reference, score); None = not counted
CASES = [
    ("exact_match", " Paris\n", "Paris", 1), ("exact_match", "p", "P", 0), ("exact_match", "", "  ", 1), ("exact_match", "a b", "a  b", 0),
    ("normalised_match", "The Eiffel-Tower!", "eiffeltower", 1), ("normalised_match", "Straße", "STRASSE", 1),
    ("normalised_match", "a cat", "cats", 0), ("normalised_match", "ﬁne  print", "fine print", 1),
    ("contains", "It is Paris.", " Paris\n", 1), ("contains", "paris", "Paris", 0),
    ("regex", "it took 12 days", r"\d+ days", 1), ("regex", "it took long", r"\d+ days", 0),
    (r"regex:#### (\S+)", "so\n#### 7\n#### 12", "x #### 12", 1), (r"regex:#### (\S+)", "#### 13", "x #### 12", 0),
    (r"regex:#### (\S+)", "12", "x #### 12", 0), (r"regex:#### (\S+)", "#### 12", "12", 1), (r"regex:\d+", "a 3", "b 3", 1),
    (r"regex:yes|(no)", "yes", "yes", 1),
    ("numeric", "she makes $1,234.50 a day", "#### 1234.5", 1), ("numeric", "-3", "3", 0), ("numeric", "5-3=2", "2", 1),
    ("numeric", "none", "4", 0), ("numeric", "4", "none", None), ("numeric", "25%", "0.25", 1), ("numeric", "1e3", "1000", 1),
    ("numeric:0.1", "109", "100", 1), ("numeric:0.1", "111", "100", 0),
    ("json_valid", '{"a": [1, null]}', "", 1), ("json_valid", '{"a": NaN}', "", 0), ("json_valid", '```json\n{}\n```', "", 0),
    ("json_valid", "[" * 100_000, "", 0),
    ("json_fields", '{"b": 2, "a": 1.0}', '{"a": 1, "b": 2}', 1), ("json_fields", '{"a": 1}', '{"a": 1, "b": 2}', 2 / 3),
    ("json_fields", '{"a": "1", "b": 2}', '{"a": 1, "b": 2}', 1 / 2), ("json_fields", "no", '{"a": 1}', 0),
    ("json_fields", '{"a": 1}', "no", None), ("json_fields", '{"a": true}', '{"a": 1}', 0), ("json_fields", "{}", "{}", 1),
    ("token_f1", "the cat sat", "a cat sat down", 0.8), ("token_f1", "", "The", 1), ("token_f1", "x", "", 0),
    ("rouge_l", "the cat is on the mat", "the cat sat on a mat", 2 / 3), ("rouge_l", "b a", "a b", 1 / 2),
    ("bleu", "the cat sat on the mat", "the cat sat on the mat", 100), ("bleu", "", "the cat", 0), ("bleu", "Paris", "Paris", 100),
    ("bleu", "the cat", "the cat", 100), ("bleu", "Oslo", "Paris", 0),
    (r"regex:\w+\.py:\d+", "in a.py:12", "at a.py:12", 1), (r"regex:\w+\.py:\d+", "in a.py:13", "at a.py:12", 0),
    ("chrf", "the cat", "the cat", 100), ("chrf:2", "the cat", "the cat", 100),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "generation", "reference", "expected"), CASES)
def test_scores_of_single_answers(spec, generation, reference, expected):
    assert value(spec, generation, reference) == (expected if expected is None else pytest.approx(expected))


def test_every_scorer_has_cases_and_is_best_where_the_answer_is_the_reference():
    assert {spec.partition(":")[0] for spec, *_ in CASES} | {"json_schema", "choice", "choice_by_byte"} == SCORERS.keys()
    for name in SCORERS.keys() - {"json_schema", "choice", "choice_by_byte"}:
        best = 100 if name in ("bleu", "chrf") else 1
        text = '{"is": "one two three four 5"}'
        assert value(name, text, text) == pytest.approx(best)


def test_a_schema_is_that_of_the_row_or_of_a_file(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    for spec, row in (("json_schema", {"schema": SCHEMA}), ("json_schema", {"schema": json.dumps(SCHEMA)}), (f"json_schema:{tmp_path}/s.json", {})):
        assert [value(spec, text, "", **row) for text in ('{"n": 3}', '{"n": 3.5}', '{"n": 3, "m": 1}', "3 ")] == [1, 0, 0, 0]


def test_the_likeliest_choice_is_chosen_by_itself_or_by_byte():
    choices = (Choice("no", -4.0, True), Choice("certainly", -9.0, False))  # -2 and -1 a byte
    answer = Answer("", "", choices=choices)
    assert [score(scorer(name), [answer]).value for name in ("choice", "choice_by_byte")] == [1, 0]
    assert scorer("choice:options").choices == "options" and scorer("choice").choices == "choices"


LONG = [
    ("the cat is on the mat and it sleeps", "the cat sat on the mat and slept"), ("hello there world", "hello world out there now"),
    ("nothing alike", "completely different words here"), ("It was 5 o'clock.", "It was five o'clock."), ("", "something"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "settings"), [("bleu", {}), ("bleu:char", {"tokenize": "char"}), ("chrf", {}), ("chrf:2", {"word_order": 2})])
def test_bleu_and_chrf_are_those_of_the_corpus_by_sacrebleu(spec, settings):
    sacrebleu = pytest.importorskip("sacrebleu")
    metric = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF}[spec.partition(":")[0]](**settings)
    scored = score(scorer(spec), [Answer(*pair) for pair in LONG])
    expected = metric.corpus_score([pair[0] for pair in LONG], [[pair[1] for pair in LONG]]).score
    assert scored.value == pytest.approx(expected) and 0 < expected < 100
    by_itself = type(metric)(**settings, **({"effective_order": True} if spec.startswith("bleu") else {}))
    each = [by_itself.sentence_score(generation, [reference]).score for generation, reference in [*LONG, ("Paris", "Paris")]]
    assert score(scorer(spec), [Answer(*pair) for pair in [*LONG, ("Paris", "Paris")]]).of_each() == pytest.approx(each)
    few = metric.corpus_score([pair[0] for pair in LONG[:2]], [[pair[1] for pair in LONG[:2]]]).score
    assert scored.select(np.arange(2)).value == pytest.approx(few)


@pytest.mark.parametrize("pair", LONG)
def test_rouge_is_that_of_rouge_score(pair):
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    if pair[0]:
        assert rouge_l(*pair) == pytest.approx(rouge.score(pair[1], pair[0])["rougeL"].fmeasure)


def squad_normalised(text):
    """The normalisation of SQuAD's evaluate-v1.1.py."""
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from(string.printable), max_size=40))
def test_normalised_texts_are_those_of_squad(text):
    for text in (text, f"The {text} an", f"a {text} the", string.punctuation.join(text)):
        assert normalised(text) == squad_normalised(text)


words = st.lists(st.sampled_from("abc"), max_size=7)


@settings(max_examples=80, deadline=None)
@given(words, words)
def test_the_longest_common_subsequence_is_that_of_all_subsequences(first, second):
    of = lambda items: {pick for size in range(len(items) + 1) for pick in itertools.combinations(items, size)}  # noqa: E731
    longest = max(map(len, of(first) & of(second)))
    assert longest_common_subsequence(first, second) == longest
    common = sum(min(first.count(w), second.count(w)) for w in "bc")  # a is an article
    sizes = len(first) + len(second) - first.count("a") - second.count("a")
    assert token_f1(" ".join(first), " ".join(second)) == pytest.approx(2 * common / sizes if sizes else 1)


@settings(max_examples=80, deadline=None)
@given(st.decimals(-10**9, 10**9, places=3), st.sampled_from(["{}", "is {}.", "x = {}", "(${})", "9 {} m"]))
def test_a_number_is_found_as_it_is_written(number, text):
    assert last_number(text.format(f"{number:,}")) == Fraction(number) == last_number(text.format(number))


def test_json_fields_are_those_of_any_nesting():
    flat = dict(leaves({"a": {"b": [1, {"c": None}]}, "d": [], "e": {}}))
    assert flat == {("a", "b", 0): "1", ("a", "b", 1, "c"): "null", ("d",): "[]", ("e",): "{}"}


@pytest.mark.parametrize("name", ["exact_match", "numeric", "json_fields", "token_f1", "bleu", "chrf"])
def test_scores_of_parts_add_up_to_the_score_of_the_whole(name):
    answers = [Answer(*pair) for pair in [("1 a", "1 a"), ("[1, 2]", "[1, 3]"), ("d", "no 7"), ("e e 3", "e 3"), *LONG]]
    whole, parts = score(scorer(name), answers), [score(scorer(name), answers[:3]), score(scorer(name), answers[3:])]
    np.testing.assert_array_equal(whole.statistics, np.concatenate([part.statistics for part in parts]))
    assert whole.counted == sum(part.counted for part in parts)
    each = [x for x in whole.of_each() if x is not None]
    if name not in ("bleu", "chrf", "json_fields"):
        assert whole.value == pytest.approx(np.mean(each))


def test_a_score_of_nothing_is_not_zero():
    assert np.isnan(score(scorer("numeric"), [Answer("4", "none")]).value)
    assert np.isnan(score(scorer("exact_match"), []).value)


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def shorter(generation, reference): return len(generation) < len(reference)\n"
        "def level(generation, reference, row): return None if row['level'] == 2 else row['level'] / 4\n"
        "def text(generation, reference): return 'good'\n"
        "def broken(generation, reference): return 1 / 0\n"
        "WORD = 3\n"
    )
    return path


def test_a_users_function_scores(user_file):
    assert [value(f"{user_file}:shorter", *pair) for pair in (("a", "bb"), ("bb", "a"))] == [1, 0]
    scored = score(scorer(f"{user_file}:level"), [Answer("", "", row={"level": n}) for n in (1, 2, 3)])
    assert scored.value == 0.5 and scored.counted == 2 and scored.of_each() == [0.25, None, 0.75]


@pytest.mark.parametrize(
    ("spec", "message"),
    [("exact", "eval.scorers: unknown scorer 'exact'; did you mean"), ("exact_match:3", "takes no argument"), ("regex:(", "no regular expression"),
     ("numeric:x", "relative tolerance"), ("{}:missing", "no function 'missing'"), ("{}:WORD", "no function"), ("no.py:f", "no file"),
     ("chrf:x", "0, 1 or 2"), ("bleu:x", "tokenizer 'x'"), ("json_schema:none.json", "none.json"), ("json_schema:{}", "cannot be read")],
)  # fmt: skip
def test_a_scorer_that_is_none_is_named(spec, message, user_file):
    with pytest.raises(UserError, match="eval.scorers") as error:
        scorer(spec.format(user_file))
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "message"), [("text", "returned 'good'"), ("broken", "raised ZeroDivisionError")])
def test_a_users_function_that_fails_is_named(user_file, name, message):
    with pytest.raises(UserError, match=message) as error:
        value(f"{user_file}:{name}", "a", "b")
    assert f"mine.py:{name}" in str(error.value)


def test_scorers_are_named_once():
    with pytest.raises(UserError, match="'contains' is named twice"):
        find_scorers(["contains", "bleu", "contains"], "--scorers")
