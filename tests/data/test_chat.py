"""Which tokens of a chat are supervised, and what a bad row does. Masks of all templates are in contracts/test_mask.py."""

import json
import re

import numpy as np
import pytest
from built_rows import build, chat, supervised, texts_of
from chat_cases import as_dicts, shared_tokenizer, template_classes_script
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import unicode_texts

from sft_jax.data.chats.chat import COUNTS, build_rows
from sft_jax.data.chats.templates import TEMPLATES, ChatTemplate
from sft_jax.data.examples import BadRow
from sft_jax.data.formats.conversation import Conversation, Message
from sft_jax.errors import UserError

# --- what is supervised ---


def test_assistant_turns_with_their_end(qwen):
    (row,) = build(qwen, "chatml", chat("a", "b", "c", "d"))
    assert (row.kind, row.counts) == ("once", {})
    assert texts_of(qwen, row) == [(-1, ["b<|im_end|>", "d<|im_end|>"])]
    example = row.examples[0]
    assert (
        example.ids.dtype == np.int32 and example.weights.dtype == np.float32 and example.turn_starts.dtype == np.int32
    )
    assert example.turn_roles == ("user", "assistant", "user", "assistant")
    assert [qwen.decode(example.ids[start:])[:16] for start in example.turn_starts] == [
        "<|im_start|>user", "<|im_start|>assi", "<|im_start|>user", "<|im_start|>assi"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("supervise", "texts"),
    [
        ("assistant", ["b<|im_end|>", "d<|im_end|>"]),
        ("last", ["d<|im_end|>"]),
        ("user", ["a<|im_end|>", "c<|im_end|>"]),
        ("system, assistant", ["s<|im_end|>", "b<|im_end|>", "d<|im_end|>"]),
        ("tool", None),
    ],
)
def test_supervise(qwen, supervise, texts):
    messages = (Message("system", "s"), *chat("a", "b", "c", "d").messages)
    (row,) = build(qwen, "chatml", Conversation(messages=messages), supervise=supervise)
    if texts is None:
        assert "no token of it is supervised" in row.reason and "'tool'" in row.reason
    else:
        assert texts_of(qwen, row) == [(-1, texts)]


def test_supervise_all_takes_every_token_but_the_first(qwen, llama):
    for tokenizer in (qwen, llama):
        (row,) = build(tokenizer, "chatml", chat("a", "b", "c", "d"), supervise="all")
        assert row.examples[0].weights.tolist() == [0, *[1] * (len(row.examples[0].ids) - 1)]


def test_supervise_is_checked(qwen):
    with pytest.raises(UserError, match="data.supervise: 'assistent': unknown role .* did you mean 'assistant'"):
        build(qwen, "chatml", supervise="assistent")


def test_weights_multiply(qwen):
    messages = (
        Message("user", "a", weight=1.0), Message("assistant", "b", weight=0.0),
        Message("user", "c"), Message("assistant", "d", weight=0.25), Message("user", "e"), Message("assistant", "f"),
    )  # fmt: skip
    (row,) = build(qwen, "chatml", Conversation(messages=messages))
    example = row.examples[0]
    assert texts_of(qwen, row) == [(-1, ["a<|im_end|>", "d<|im_end|>", "f<|im_end|>"])]
    assert row.counts == {"marked_messages": 1}  # the row says so, although the run supervises answers only
    assert sorted(set(example.weights.tolist())) == [0, 0.25, 1]
    assert supervised(qwen, example, above=0.5) == ["a<|im_end|>", "f<|im_end|>"]
    (row,) = build(qwen, "chatml", Conversation(messages=messages), supervise="all")
    assert sorted(set(row.examples[0].weights[1:].tolist())) == [0, 0.25, 1]
    (row,) = build(qwen, "chatml", Conversation(messages=messages[1:2]), supervise="last")
    assert "no token of it is supervised" in row.reason
    (row,) = build(qwen, "chatml", Conversation(messages=messages), supervise="last")  # and d has a weight of its own
    assert texts_of(qwen, row) == [(-1, ["a<|im_end|>", "d<|im_end|>", "f<|im_end|>"])]
    assert row.counts == {"marked_messages": 2}


@pytest.mark.parametrize(
    ("supervise", "texts"),
    [
        ("assistant", ["d<|im_end|>"]),
        ("last", ["d<|im_end|>"]),
        ("user", ["a<|im_end|>", "c<|im_end|>"]),
        ("assistant,user", ["a<|im_end|>", "c<|im_end|>", "d<|im_end|>"]),
        ("all", None),
    ],
)
def test_a_prompt_that_is_a_list_is_supervised_like_one_that_is_text(qwen, supervise, texts):
    """No assistant turn of a prompt is an answer, but "all" and named roles reach into it."""
    given = [Message(role, text, given=True) for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    (row,) = build(qwen, "chatml", Conversation(messages=(*given, Message("assistant", "d"))), supervise=supervise)
    assert row.counts == {}
    if texts is None:
        assert row.examples[0].weights.tolist() == [0, *[1] * (len(row.examples[0].ids) - 1)]
    else:
        assert texts_of(qwen, row) == [(-1, texts)]


def test_answers_without_text_are_counted(qwen, llama):
    turns = (Message("user", "a"), Message("assistant", " "), Message("user", "b"), Message("assistant", "c"))
    for supervise in ("assistant", "all"):
        (row,) = build(qwen, "chatml", Conversation(messages=turns), supervise=supervise)
        assert row.counts == {"empty_answers": 1}
    thinking = (turns[0], Message("assistant", "", reasoning="x"))
    ignored = (turns[0], Message("assistant", "", weight=0.0), *turns[2:])
    for messages in (thinking, ignored):
        (row,) = build(qwen, "chatml", Conversation(messages=messages))
        assert "empty_answers" not in row.counts
    rows = build(llama, None, Conversation(prompt="a", completion=""), Conversation(prompt="", completion="b"))
    assert [row.counts for row in rows] == [{"empty_answers": 1}, {}]
    assert rows[0].examples[0].ids[rows[0].examples[0].weights > 0].tolist() == [llama.eos_id]


def test_a_turn_that_nothing_asks_for(qwen):
    (row,) = build(qwen, "chatml", Conversation(messages=(Message("assistant", "Welcome!"), *chat("a", "b").messages)))
    assert texts_of(qwen, row) == [(-1, ["b<|im_end|>"])]
    assert row.counts == {"unprompted_turns": 1}
    (row,) = build(qwen, "chatml", Conversation(messages=(Message("assistant", "Welcome!"),)))
    assert "no token of it is supervised" in row.reason


def test_prompt_and_completion_are_a_chat_where_there_is_a_template(qwen):
    rows = build(
        qwen, "chatml",
        Conversation(prompt="p", completion="c", system="s", separator="\n\n"),
        Conversation(messages=(Message("system", "s"), Message("user", "p"), Message("assistant", "c"))),
    )  # fmt: skip
    assert rows[0].examples[0].ids.tolist() == rows[1].examples[0].ids.tolist()
    assert texts_of(qwen, rows[0]) == [(-1, ["c<|im_end|>"])]


# --- the versions with {% generation %} ---

# What the tagged span of TRL's version has before and after ours: the beginning of the answer that a server feeds, and
# white space or EOS behind the end-of-turn.
TAGGED = {
    "cohere2": ("", ""),
    "deepseekv3": ("<｜Assistant｜>", ""),
    "gemma": ("", "\n"),
    "gptoss": ("<|start|>assistant", ""),
    "llama3": ("", ""),
    "phi3": ("", "\n</s>"),
    "qwen2_5": ("\n", "\n"),
    "qwen3": ("", "\n"),
}


@pytest.mark.parametrize("name", TAGGED)
def test_generation_tags_mark_what_we_derive(assets, qwen, name):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    folder = assets / "chat_templates" / "with_generation_tag"
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    conversation = chat("Hello", "Hi there.")
    tagged = (folder / f"{name}.generation.jinja").read_text()
    (text,), (spans,) = utils.render_jinja_template(
        [as_dicts(conversation.messages)], chat_template=tagged, return_assistant_tokens_mask=True, **special
    )
    marked = "".join(text[start:end] for start, end in spans)
    before, after = TAGGED[name]
    for kind in ("stock", "generation"):
        template = ChatTemplate((folder / f"{name}.{kind}.jinja").read_text(), special)
        (row,) = build_rows([conversation], qwen, template)
        ((_, (ours,)),) = texts_of(qwen, row)
        # An end-of-turn that the tokenizer does not know may share its last token with the white space behind it.
        assert before + ours.rstrip() + after == marked.rstrip() + after[len(after.rstrip()) :], kind


# --- errors stay in their row ---


def test_bad_rows_do_not_affect_others(qwen):
    source = "{% if messages[0].content == 'bad' %}{{ raise_exception('Not that.') }}{% endif %}" + TEMPLATES["chatml"]
    rows = [chat("a", "b"), chat("bad", "b"), chat("a"), chat("\ud800", "b"), chat("c", "d")]
    built = build(qwen, source, *rows)
    assert [isinstance(row, BadRow) for row in built] == [False, True, True, True, False]
    assert "Not that." in built[1].reason
    assert "no token of it is supervised" in built[2].reason
    assert "surrogate" in built[3].reason
    alone = build(qwen, source, rows[-1])[0]
    assert built[-1].examples[0].ids.tolist() == alone.examples[0].ids.tolist()
    assert built[-1].examples[0].weights.tolist() == alone.examples[0].weights.tolist()


def test_a_chat_without_a_template(qwen):
    (row,) = build(qwen, None, chat("a", "b"))
    assert "data.chat_template" in row.reason and "chatml" in row.reason


def test_a_template_that_changes_answers_is_refused_with_both_texts(qwen):
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}<|im_end|>{% endfor %}"
    source += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (row,) = build(qwen, source, chat("a", "hello"))
    assert "'hello'" in row.reason and "HELLO" in row.reason


def test_a_prompt_that_is_nowhere_in_the_conversation_is_refused_with_both_texts(qwen):
    source = "{% if add_generation_prompt %}Answer this: {{ messages[-1].content }}{% else %}"
    source += "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}{% endif %}"
    (row,) = build(qwen, source, chat("question", "hello"))
    assert "Answer this: question" in row.reason and "user=question;assistant=hello" in row.reason


def test_a_thinking_section_that_the_template_leaves_empty(qwen):
    """The prompt opens it with a newline, which the render does not have."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    (row,) = build(qwen, source, chat("1?", "One.", "2?", "Two.", "3?", "Three."))
    answers = ["</think>One.<|im_end|>", "</think>Two.<|im_end|>", "</think>Three.<|im_end|>"]
    assert texts_of(qwen, row) == [(turn, [text]) for turn, text in enumerate(answers)]
    template = ChatTemplate(source, qwen.special_tokens)
    for example in row.examples:
        prompt = template.render(as_dicts(chat("1?", "One.", "2?", "Two.", "3?").messages[: 2 * example.turn + 1]), True)
        start = int(np.flatnonzero(example.weights)[0])
        assert example.ids[:start].tolist() == qwen.encode(prompt)


def test_white_space_that_begins_answers_where_the_system_prompt_moves(qwen):
    source = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    system = Message("system", "Be terse.")
    (row,) = build(qwen, source, Conversation(messages=(system, *chat("1?", "One.", "2?", "Two.").messages)))
    assert texts_of(qwen, row) == [(0, [" One.<|im_end|>"]), (1, [" Two.<|im_end|>"])]
    assert [qwen.decode(example.ids) for example in row.examples] == [
        "[INST] Be terse.\n\n1?[/INST] One.<|im_end|>",
        "[INST] 1?[/INST] One.<|im_end|>[INST] Be terse.\n\n2?[/INST] Two.<|im_end|>",
    ]


def test_the_end_of_turns_of_a_template_that_needs_tools(qwen):
    """What it writes after the last turn, for the next one, is no part of the answer."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>system\nUse {{ tools[0].name }}.<|im_end|>\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (row,) = build(qwen, source, chat("1?", "One.", tools=({"name": "add"},)))
    assert texts_of(qwen, row) == [(0, ["One.<|im_end|>"])]
    assert build(qwen, source, chat("1?", "One."))[0].reason.startswith("the chat template does not accept the conversation")


def test_a_prompt_is_not_looked_for_in_earlier_turns(qwen):
    """An earlier answer begins as this one does, but the prompt ends otherwise."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}[A] {% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n[B] {% endif %}"
    )
    (row,) = build(qwen, source, chat("1?", "One.", "2?", "Two."), supervise="last")
    assert isinstance(row, BadRow) and "message 3 cannot be supervised" in row.reason
    assert r"assistant\n[B] '" in row.reason and r"assistant\n[A] Two.<|im_end|>\n'" in row.reason


def test_messages_that_the_template_leaves_out_are_counted(qwen):
    """A system prompt or a result of a tool that is nowhere in the text; a last question without an answer is no loss."""
    source = (
        "{% for m in messages if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    plain, hidden = chat("1?", "One.", "2?"), (Message("system", "Be brief."), *chat("1?", "One.").messages, Message("tool", "2"), Message("assistant", "Two."))
    rows = build(qwen, source, plain, Conversation(messages=hidden))
    assert [row.counts for row in rows] == [{}, {"hidden_messages": 2}]


def test_a_tokenizer_without_eos(qwen):
    values, files = qwen.state()
    del values["kind"]
    without = type(qwen).from_state({**values, "eos_id": None, "special_tokens": {}}, files)
    with pytest.raises(UserError, match="no EOS token"):
        build(without, None, Conversation(prompt="a", completion="b"))


# --- any content ---

contents = st.one_of(
    unicode_texts,
    st.sampled_from(
        ["", " ", "yes", "user", "assistant", "\n\n", "<think>", "</think>", "<|im_end|>", "a<think>b</think>c"]
    ),
)


@settings(max_examples=120, deadline=None)
@given(texts=st.lists(contents, min_size=2, max_size=6), name=st.sampled_from(["chatml", "zephyr", "llama3"]))
def test_any_content(tiny, texts, name):
    """Supervised is each answer with its end, in order, whatever anybody says."""
    texts = texts[: len(texts) // 2 * 2]
    (row,) = build(tiny, name, chat(*texts))
    assert not isinstance(row, BadRow), row
    end = {"chatml": "<|im_end|>", "zephyr": "</s>", "llama3": "<|eot_id|>"}[name]
    want = {turn: (text.strip() if name == "llama3" else text) + end for turn, text in enumerate(texts[1::2])}
    got = []
    for example in row.examples:
        stretches = supervised(tiny, example)
        got += stretches if example.turn < 0 else [(example.turn, *stretches)]
    own = {item[0]: item[1] for item in got if isinstance(item, tuple)}
    shared = iter([item for item in got if not isinstance(item, tuple)])
    # The vocabulary has no other sign for a space than SentencePiece's, and none for half of a character.
    plain = [own[turn] if turn in own else next(shared) for turn in want]
    plain, wanted = ([text.replace("▁", " ").rstrip() for text in texts] for texts in (plain, want.values()))
    assert plain == wanted


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(contents, min_size=2, max_size=6))
def test_turn_starts_are_in_order_and_inside(tiny, texts):
    (row,) = build(tiny, "chatml", chat(*texts[: len(texts) // 2 * 2]))
    for example in row.examples:
        assert len(example.turn_starts) == len(example.turn_roles)
        assert (np.diff(example.turn_starts) >= 0).all() and (example.turn_starts < len(example.ids)).all()


# --- the golden table ---


def test_template_classes(assets):
    """How stock templates turn each shape of conversation into examples; see scripts/make_template_classes.py."""
    script = template_classes_script()
    golden = json.loads(script.GOLDEN.read_text(encoding="utf-8"))
    table = script.make_table(assets, shared_tokenizer(assets / "tokenizers" / "llama3"))
    assert set(table) == set(golden)
    changed = {name: table[name] for name in table if table[name] != golden[name]}
    assert changed == {}
    kinds = [
        value.partition(" ")[0] for row in golden.values() for shape, value in row.items() if shape != "end of turn"
    ]
    assert set(kinds) == {"once", "cut", "per_turn", "refused:"}
    # Refusals are the templates' own, or show what was given and what became of it.
    refused = {(shape, value) for row in golden.values() for shape, value in row.items() if value.startswith("refused:")}
    own = "does not accept the conversation"
    assert all(own in value for shape, value in refused if not shape.startswith("tool call"))
    rest = [value for shape, value in refused if own not in value]
    both = re.compile(r"Given in message 1: '\[\{.*; rendered: ['\"]|Prompt: '.*; conversation: '")
    assert all(both.search(value) for value in rest)
    unrendered = [value for _, value in refused if "shows no calls of tools" in value and own in value]
    assert unrendered and all("Given in message 1: '[{" in value and "}]'; nothing is rendered." in value for value in unrendered)


def test_counts_are_documented(stock, tiny):
    answers = ("<think>x</think>b", "b")
    sources = [stock[name] for name in ("GLM-4.6", "deepseek-ai-DeepSeek-V3.1", "Qwen3.5-4B", "Kimi-K2-Instruct")]
    chats = [chat("</s>", answer, "c", answer) for answer in answers]
    rows = [row for source in sources for row in build(tiny, source, *chats)]
    names = {name for row in rows for name in row.counts}
    assert names >= {"guarded", "per_turn", "reasoning_dropped", "end_added"} and names <= set(COUNTS)
