"""System prompts by line, and nearest texts against scikit-learn and against a float64 loop over words."""

import math
from collections import Counter

import numpy as np
import pytest

from sft_jax.comparison.retrieval import TextIndex
from sft_jax.comparison.systems import System, read_systems
from sft_jax.errors import UserError

WORDS = "lamp alarm oslo train ticket noon rain seven kitchen music".split()


def drawn(count, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def cosines(texts, asked):
    """TF-IDF by the book, over dicts of words and pairs."""

    def terms(text):
        words = text.split()
        return Counter([*words, *zip(words, words[1:], strict=False)])

    counted = [terms(text) for text in texts]
    documents = Counter(term for found in counted for term in found)

    def vector(found):
        return {term: (1 + math.log(n)) * (math.log((1 + len(texts)) / (1 + documents[term])) + 1) for term, n in found.items()}

    def norm(values):
        return math.sqrt(sum(value**2 for value in values.values()))

    query = vector(terms(asked))
    vectors = [vector(found) for found in counted]
    return [sum(weight * query.get(term, 0) for term, weight in values.items()) / norm(values) / norm(query) for values in vectors]


def test_similarities_are_cosines_of_tf_idf():
    texts = drawn(60, 0)
    index = TextIndex(texts)
    for asked in [*drawn(12, 1), texts[7], "lamp lamp something new"]:
        assert index.similarities(asked) == pytest.approx(cosines(texts, asked), rel=1e-12, abs=1e-15)
    assert index.similarities("quite another thing").tolist() == [0.0] * 60
    assert index.similarities("").tolist() == [0.0] * 60


def test_similarities_are_those_of_scikit_learn():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts, asked = drawn(200, 2), drawn(20, 3)
    theirs = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(texts)
    expected = (theirs.transform(asked) @ theirs.transform(texts).T).toarray()  # words of a query that no text has do not count there
    index = TextIndex(texts)
    for row, each in zip(expected, asked, strict=True):
        ours = index.similarities(each)
        assert ours / (np.linalg.norm(ours) or 1) == pytest.approx(row / (np.linalg.norm(row) or 1), rel=1e-9, abs=1e-12)


def test_the_nearest_come_first_and_equal_ones_in_their_order():
    index = TextIndex(["rain at noon", "music", "Rain, at NOON!", "rain"])
    assert index.nearest("rain at noon", 3) == [0, 2, 3] and len(index.nearest("rain", 9)) == 4


def test_no_texts_are_no_neighbours():
    assert TextIndex([]).nearest("rain", 3) == []
    assert TextIndex(["", "?"]).nearest("rain", 3) == [0, 1]


def test_a_file_holds_prompts_of_several_lines(tmp_path):
    path = tmp_path / "systems.txt"
    path.write_text("\n--- terse\nBe brief.\n\n---   with an example \nFirst.\n\n---- no head\n-- nor this\n")
    assert read_systems(str(path)) == [System("terse", "Be brief."), System("with an example", "First.\n\n---- no head\n-- nor this")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Be brief.\n--- terse\n", r"x.txt:1: belongs to no prompt"),
        ("--- a\none\n---\ntwo\n", "x.txt:3: names no prompt"),
        ("--- a\none\n--- a\ntwo\n", "x.txt:3: a prompt 'a' is there already"),
        ("--- a\none\n--- b\n\n", "x.txt:3: the prompt 'b' has no text"),
        ("\n \n", "x.txt: holds no prompt"),
        (b"\xff\xfe", "x.txt: cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_by_line(tmp_path, text, message):
    path = tmp_path / "x.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_systems(str(path))
    with pytest.raises(UserError, match="nothing.txt: cannot be read"):
        read_systems(str(tmp_path / "nothing.txt"))
