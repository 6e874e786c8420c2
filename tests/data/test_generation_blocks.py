"""`{% generation %}` is honoured, and in templates that have it right it says what is derived without it."""

import re

import pytest
from chat_cases import CHATS, as_dicts, shared_tokenizer, template_classes_script

from sft_jax.data.chats.chat import RowBuilder
from sft_jax.data.chats.templates import ChatTemplate
from sft_jax.data.examples import BadRow
from sft_jax.data.formats.conversation import Conversation, Message, Piece

NAMES = ("cohere2", "deepseekv3", "gemma", "gptoss", "llama3", "phi3", "qwen2_5", "qwen3")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}BLOCK{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLOCK = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"


@pytest.fixture(scope="module")
def tokenizer(assets):
    script = template_classes_script()
    return script.with_markers(shared_tokenizer(assets / "tokenizers" / "llama3"), list(script.stock_templates(assets).values()))


def supervised(builder, messages):
    (row,) = builder.build([Conversation(messages=messages)])
    return row if isinstance(row, BadRow) else [(example.ids.tolist(), example.weights.tolist()) for example in row.examples]


@pytest.mark.parametrize("name", NAMES)
def test_published_blocks_agree_with_what_is_derived(name, assets, tokenizer):
    source = (assets / "chat_templates/with_generation_tag" / f"{name}.generation.jinja").read_text()
    plain = re.sub(r"(\{%-?\s*)(end)?generation(\s*-?%\})", lambda match: f"{match[1]}{'endif' if match[2] else 'if true'}{match[3]}", source)
    template = ChatTemplate(source, tokenizer.special_tokens)
    assert template.marks_generation and not ChatTemplate(plain, tokenizer.special_tokens).marks_generation
    blocks, derived = (RowBuilder(tokenizer, ChatTemplate(text, tokenizer.special_tokens)) for text in (source, plain))
    differing = {shape for shape, messages in CHATS.items() if str(supervised(blocks, messages)) != str(supervised(derived, messages))}
    assert differing == set()


# What blocks hold beside what has to be generated: the end of the prompt, and what follows the end of a turn.
MORE = {"gptoss": ["<|start|>assistant", "><|start|>assistant"], "phi3": ["<|im_end|>"]}


@pytest.mark.parametrize("name", NAMES)
def test_against_the_mask_of_transformers(name, assets):
    """Of tokens, where the row is tokenised once, up to white space behind the end of a turn."""
    transformers = pytest.importorskip("transformers")
    folder = assets / "tokenizers" / "qwen3"
    ours, reference = shared_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    source = (assets / "chat_templates/with_generation_tag" / f"{name}.generation.jinja").read_text()
    builder, compared = RowBuilder(ours, ChatTemplate(source, ours.special_tokens)), 0
    for shape in ("one turn", "five turns", "system"):
        (row,) = builder.build([Conversation(messages=CHATS[shape])])
        if isinstance(row, BadRow) or row.kind != "once":
            continue
        found = reference.apply_chat_template(
            as_dicts(CHATS[shape]), chat_template=source, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
        (example,) = row.examples
        assert example.ids.tolist() == found["input_ids"]
        masks = zip(example.ids.tolist(), example.weights, found["assistant_masks"], strict=True)
        wrong = [(id_, weight, mask) for id_, weight, mask in masks if weight != mask and ours.decode([id_]).strip()]
        more = re.sub("|".join(map(re.escape, MORE.get(name, ["x^"]))), "", ours.decode([id_ for id_, _, _ in wrong]))
        assert more == "" and all((weight, mask) == (0, 1) for _, weight, mask in wrong), wrong
        compared += 1
    assert compared or name in ("gptoss", "deepseekv3", "cohere2"), "nothing was compared"


MESSAGES = (Message("user", "a"), Message("assistant", "b c"), Message("user", "d"), Message("assistant", "e"))


def build(tokenizer, block, messages=MESSAGES):
    template = ChatTemplate(CHATML.replace("BLOCK", block), tokenizer.special_tokens)
    (row,) = RowBuilder(tokenizer, template).build([Conversation(messages=messages)])
    return row


def text_of(tokenizer, row):
    return [tokenizer.decode(example.ids[example.weights > 0].tolist()) for example in row.examples]


def test_what_a_block_leaves_out_is_not_supervised(tokenizer):
    whole = build(tokenizer, BLOCK)
    assert text_of(tokenizer, whole) == ["b c<|im_end|>e<|im_end|>"] and whole.counts == {}
    endless = build(tokenizer, "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>")
    assert text_of(tokenizer, endless) == ["b ce"] and endless.counts == {"generation_less": 2, "end_left_out": 2}
    late = build(tokenizer, "{% generation %}{{ m.content[:1] }}{% endgeneration %}{{ m.content[1:] }}{% generation %}<|im_end|>{% endgeneration %}")
    assert text_of(tokenizer, late) == ["b<|im_end|>e<|im_end|>"] and late.counts == {"generation_less": 1}


def test_a_block_never_supervises_the_prompt(tokenizer):
    source = CHATML.replace("<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}BLOCK", "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>{% endgeneration %}").replace(
        "{% else %}{{", "{% else %}<|im_start|>{{ m.role }}\n{{"
    )
    (row,) = RowBuilder(tokenizer, ChatTemplate(source, tokenizer.special_tokens)).build([Conversation(messages=MESSAGES)])
    assert text_of(tokenizer, row) == ["b c<|im_end|>e<|im_end|>"]


def test_a_block_wins_over_weights_of_parts(tokenizer):
    answer = Message("assistant", "b c", pieces=(Piece(1, 3, 0.5),))
    row = build(tokenizer, "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>", (MESSAGES[0], answer))
    (example,) = row.examples
    assert sorted(set(example.weights.tolist())) == [0, 0.5, 1] and text_of(tokenizer, row) == ["b c"]


def test_a_block_that_cannot_be_told_is_refused(tokenizer):
    row = build(tokenizer, "{% filter reverse %}" + BLOCK + "{% endfilter %}")
    assert isinstance(row, BadRow)
    row = build(tokenizer, "{% set t %}" + BLOCK + "{% endset %}{{ t }}{{ t|length }}")
    assert isinstance(row, BadRow) and "cannot be told from the render" in row.reason
