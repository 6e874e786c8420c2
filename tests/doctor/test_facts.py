"""Whatever a row holds, what is found out about it is a result and no crash."""

import json

from doctor_data import configure, rows, sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import lines, write

from sft_jax.config import ColumnsConfig
from sft_jax.data.formats.registry import FORMATS
from sft_jax.doctor.check import diagnose, run_check
from sft_jax.doctor.facts import FactFinder, Setup
from sft_jax.doctor.texts import hash_words, words

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=())) | st.sampled_from(
    ["", " ", "<|im_end|>", "```", "\ud800", "1 + 1", "a@b.cd"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | ANY_TEXT, lambda inner: st.lists(inner, max_size=3), max_leaves=5
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": ANY_TEXT}), max_size=5
)
ROWS = (
    st.fixed_dictionaries({"messages": TURNS}) | st.fixed_dictionaries({"prompt": ANY_TEXT, "completion": ANY_TEXT})
    | st.fixed_dictionaries({"text": ANY_TEXT})
    | st.dictionaries(st.sampled_from(["prompt", "completion", "text", "messages", "question"]), VALUES)
)  # fmt: skip
FORMAT_NAMES = [*FORMATS, ""]
FINDER = FactFinder(Setup(tuple((name, ColumnsConfig(), "train" if name else "benchmark") for name in FORMAT_NAMES)))


@settings(deadline=None, max_examples=300)
@given(ROWS, st.integers(0, len(FORMAT_NAMES) - 1))
def test_any_row_gives_facts(row, number):
    (facts,) = FINDER([(0, number, row)])
    again = FINDER([(0, number, json.loads(json.dumps(row)))])[0]
    assert facts.faults == again.faults and facts.whole == again.whole
    assert not any("\ud800" in detail for kind, detail in facts.faults if kind != "unreadable")


def test_facts_of_a_benchmark_row_are_those_of_its_question():
    (facts,) = FINDER([(0, FORMAT_NAMES.index(""), {"id": 7, "question": "Why is it so?", "choices": ["a", "b"]})])
    assert facts.prompt_words.tolist() == hash_words(words("Why is it so?")).tolist()
    assert facts.answer_words.tolist() == hash_words(words("Why is it so? a b")).tolist()


def test_half_a_surrogate_pair_is_reported_and_copied(tmp_path):
    bad = '{"prompt": "x \\ud800", "completion": "y"}\n'
    config = configure(tmp_path, rows(5))
    (tmp_path / "train.jsonl").write_text(lines(*rows(5)) + bad)
    benchmark = write(tmp_path, "bench.jsonl", '{"question": "What is \\ud800 in the old harbour of the island?"}\n')
    (finding,) = diagnose(config.data, [benchmark]).findings["unreadable"]
    assert finding.line == 6 and finding.detail.startswith("'prompt' holds half of a surrogate pair at character 3")
    run_check(config, fix=str(tmp_path / "out"))
    (removed,) = (tmp_path / "out/removed.jsonl").read_text().splitlines()
    assert json.loads(removed)["row"] == json.loads(bad)
    array = write(
        tmp_path,
        "rows.json",
        f'[{json.dumps(rows(1)[0])}, {{"prompt": "{sentence(1)}", "completion": "{sentence(2)}", "id": "\\ud800"}}]',
    )
    run_check(configure(tmp_path, rows(1), train=array), fix=str(tmp_path / "again"))
    assert json.loads((tmp_path / "again/train/rows.jsonl").read_text().splitlines()[1])["id"] == "\ud800"
