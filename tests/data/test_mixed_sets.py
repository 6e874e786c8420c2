"""Sets of one run over the same rows, each with its own format, columns, mask rule, over-length policy and cap."""

import itertools
from collections import defaultdict

import pytest
from preparing import model, run, turn, write  # fixtures too

SETS = {
    "answers": {"format": "messages", "overlength": "drop"},
    "last": {"format": "messages", "supervise": "last", "overlength": "keep_last_turns"},
    "everything": {"format": "messages", "supervise": "all", "overlength": "truncate_left"},
    "pairs": {"format": "prompt_completion", "columns": {"prompt": "text", "completion": "prompt"}, "overlength": "split"},
    "text": {"format": "text", "overlength": "truncate_right", "cap": 7},
}


def rows(count):
    """Rows that every format above reads, every third too long for a row."""
    for number in range(count):
        long = " red fox" * (40 if number % 3 == 0 else 1)
        messages = [turn("user", f"First {number}?"), turn("assistant", f"One.{long}"), turn("user", "More?"), turn("assistant", "Two.")]
        yield {"messages": messages, "prompt": f"Question {number}?{long}", "completion": " The owl.", "text": f"Old {number}.{long}"}


def documents(stream):
    """Returns set -> (line, turn) -> the documents made of it, [(ids, weights)]."""
    found = defaultdict(lambda: defaultdict(list))
    for number in range(stream.document_count):
        example, ids, weights = stream.document(number)
        name, _, line, place = stream.identity(example)
        found[name][line, place].append((ids.tolist(), weights.tolist()))
    return found


@pytest.mark.filterwarnings("error")
def test_each_set_is_what_it_is_alone(run, tmp_path):
    """With several workers, which all see rows of all sets."""
    path = write(tmp_path / "rows.jsonl", rows(30))
    train = {name: {"path": path, **options} for name, options in SETS.items()}
    options = {"chat_template": "chatml", "max_length": 100}
    together = run(train, workers=2, **options)
    found, counts = documents(together.train), together.train.set_counts(together.train.total_rows)
    assert list(counts) == list(SETS)
    for name, item in train.items():
        alone = run({name: item}, cache_dir=str(tmp_path / name), **options)
        assert found[name] == documents(alone.train)[name], name
        assert counts[name] == alone.train.set_counts(alone.train.total_rows)[name]
        assert together.report["train"]["sets"][name] == alone.report["train"]["sets"][name]
    assert all(found[a] != found[b] for a, b in itertools.combinations(SETS, 2))  # else one could stand for the other
