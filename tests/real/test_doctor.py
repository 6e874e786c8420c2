"""What the doctor finds in public data sets: few things, each of which was looked at by eye."""

import pytest

from sft_jax.config import default_config
from sft_jax.config_parsing import parse_config
from sft_jax.doctor.check import diagnose


def counts(assets, train, held_out=None, **columns):
    """Returns {kind: rows} of what is found."""
    config = default_config()
    config.model.path = "unused"
    config.data.train = str(assets / "datasets" / train)
    if held_out:
        config.data.eval = str(assets / "datasets" / held_out)
    for name, field in columns.items():
        config.data.columns[name] = field
    return {kind: result.rows for kind, result in diagnose(parse_config(config).data).kinds.items() if result.rows}


@pytest.mark.slow
def test_gsm8k_has_a_few_common_sentences(assets):
    found = counts(assets, "gsm8k/train.jsonl", "gsm8k/test.jsonl", prompt="question", completion="answer")
    assert found == {"overlap": 7}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (
            "llamafactory_demo/alpaca_en_demo.json",
            {
                "duplicate": 14, "cut_answer": 5, "one_word_answer": 11, "refusal": 2, "boilerplate": 25,
                "unbalanced_fences": 1, "personal_data": 2,
            },
        ),
        ("llamafactory_demo/identity.json", {"conflicting_answers": 2}),
    ],
)  # fmt: skip
def test_instruction_sets(assets, file, expected):
    assert counts(assets, file) == expected
