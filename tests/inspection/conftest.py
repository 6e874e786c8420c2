"""A model directory with nothing but a small tokenizer, and a way to open data with it for inspection."""

import pytest
import sentencepiece
from inspected_rows import write

from sft_jax.config_parsing import parse_config
from sft_jax.inspection.subject import open_subject

# Renders reasoning of the last assistant turn only, as many templates do: a conversation with some becomes several examples.
TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last and message.reasoning_content %}<think>{{ message.reasoning_content }}</think>
{% endif %}{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    corpus = [
        f"What says the {a} {b} number {i}? It says {i * 7919 % 1000}."
        for i in range(100)
        for a, b in [("red", "fox"), ("old", "owl")]
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def inspected(model, cache):
    """Opens data for inspection, with one worker and given keys of `data`."""

    def go(train, *, settings=None, **data):
        fixed = {
            "cache_dir": str(cache), "max_length": 128, "workers": 1, "chat_template": str(model / "template.jinja"),
            "add_tokens": "<|im_start|>,<|im_end|>",
        }  # fmt: skip
        config = parse_config({**(settings or {}), "model": {"path": str(model)}, "data": {"train": train, **fixed, **data}})
        return open_subject(config, str(model), None, log=lambda line: None)

    return go


@pytest.fixture
def written(tmp_path):
    """Writes rows to a file of a name."""

    return lambda rows, name="train.jsonl": write(tmp_path / name, rows)
