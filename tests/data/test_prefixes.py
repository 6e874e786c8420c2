"""What one render shows of all prompts is what renders of the prompts show, or it is not used."""

import random

import pytest

from sft_jax.data.chats import spans
from sft_jax.data.chats.chat import RowBuilder
from sft_jax.data.chats.prefixes import find_prefixes
from sft_jax.data.chats.rendering import Rendering
from sft_jax.data.chats.spans import parse_supervise, plan_chat
from sft_jax.data.chats.templates import TEMPLATES, ChatTemplate, message_dict
from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import Conversation, Message
from sft_jax.data.formats.tool_calls import Call

# Of the templates here these write one message after the other; new ones are welcome, none may be lost.
ONE_BY_ONE = {
    "HuggingFaceTB-SmolLM3-3B", "Kimi-K2-Instruct", "Qwen-Qwen2.5-7B-Instruct", "Qwen3-Coder", "google-gemma-2-2b-it",
    "meetkai-functionary-medium-v3.1", "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct", "microsoft-Phi-3.5-mini-instruct", "llama3.generation", "qwen2_5.generation",
    "gemma.generation", *TEMPLATES,
}  # fmt: skip
LOOP = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
END = "{% if add_generation_prompt %}<assistant>{% endif %}"
# Templates whose renders of the first messages are no beginnings, or may be none, each in another way.
OTHERS = [
    "{% for message in messages %}{{ message.content }}{% if not loop.last %},{% endif %}{% endfor %}" + END,
    "{% for message in messages %}{{ message.content }}{% if not loop['last'] %},{% endif %}{% endfor %}" + END,
    "{% for message in messages %}{{ loop.revindex }}{{ message.content }}{% endfor %}" + END,
    "{% for message in messages %}{{ message.content }}{{ loop.nextitem.role }}{% endfor %}" + END,
    "{% macro f(l) %}{{ l.last }}{% endmacro %}{% for message in messages %}{{ message.content }}{{ f(loop) }}{% endfor %}" + END,
    "{{ messages | length }}" + LOOP + END,
    "{{ messages[-1].content }}" + LOOP + END,
    "{{ messages[3].content }}" + LOOP + END,
    "{{ messages[1:3] | map(attribute='content') | join }}" + LOOP + END,
    "{% if messages is sequence %}s{% endif %}" + LOOP + END,
    "{% if messages is iterable %}i{% endif %}" + LOOP + END,
    "{{ messages | tojson }}" + LOOP + END,
    "{{ messages }}" + LOOP + END,
    "{% set rest = messages[3:] %}{% if rest %}r{% endif %}" + LOOP + END,
    "{% set n = namespace(x=0) %}{% for message in messages %}{% set n.x = n.x + 1 %}{{ message.content }}{% endfor %}{{ n.x }}" + END,
    "{% set n = namespace(x=0) %}{% set m = n %}{% for message in messages %}{% set n.x = n.x + 1 %}{{ message.content }}{% endfor %}{{ m.x }}",
    "{% set n = namespace(x=0) %}{% macro f() %}{{ n.x }}{% endmacro %}{% for message in messages %}{% set n.x = n.x + 1 %}{{ message.content }}{% endfor %}{{ f() }}",
    "{% set c = cycler('a', 'b') %}{% for message in messages %}{{ message.content }}{{ c.next() }}{% endfor %}{{ c.current }}",
    "{% set j = joiner(',') %}{% for message in messages %}{{ message.content }}{% if loop.index > 2 %}{{ j() }}{% endif %}{% endfor %}{{ j() }}" + END,
    "{% for message in messages %}{{ message.content }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}" + END,
    "{% for message in messages if message.role != 'user' %}{{ message.content }}{% endfor %}" + END,
    "{% for message in messages | reverse %}{{ message.content }}{% endfor %}" + END,
    "{% for message in messages[2:] %}{{ message.content }}{% endfor %}" + END,
    "{% for message in messages %}{{ message.content }}{% endfor %}{{ messages[0].content }}{{ messages[2].content }}",
    LOOP + "{% for message in messages %}{{ message.role }}{% endfor %}",
    LOOP + LOOP + END,
    LOOP + "{% if messages[-1].role == 'user' %}<assistant>{% endif %}",
    "{% if not add_generation_prompt %}#{% endif %}" + LOOP + END,
]  # fmt: skip
KEPT = [
    LOOP + END,
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if loop.first %}{{ system }}{% endif %}{{ message.content }}{{ turns[loop.index0].role }}{% endfor %}{{ eos }}" + END,
    "{% set n = namespace(x=0) %}{% for message in messages %}{% set n.x = n.x + 1 %}{{ n.x }}{{ message.content }}{% endfor %}" + END,
]  # fmt: skip


def random_chat(choose: random.Random, turns: int, markup: bool = True) -> list[Message]:
    texts = ["Hi", " a ", "", "<think>\nx\n</think>\n\ny", "\n- b", "漢字", "</s> z", "<tool_response>1</tool_response>"] if markup else ["Hi", "b c"]
    messages = [Message("system", "Be kind.")] * choose.randrange(2)
    for _ in range(turns):
        messages += [Message("user", choose.choice(texts))]
        if markup and choose.random() < 0.15:
            call = Call("add", {"of": [1]}, '{"of": [1]}', "call00001")
            messages += [Message("assistant", "", calls=(call,)), Message("tool", "42", call_id="call00001", name="add")]
        reasoning = "Hm." if markup and choose.random() < 0.2 else None
        messages += [Message("assistant", choose.choice(texts), reasoning=reasoning)]
    return messages


@pytest.fixture(scope="module")
def templates(assets):
    paths = sorted((assets / "chat_templates").rglob("*.jinja"))
    sources = {path.stem: path.read_text(encoding="utf-8") for path in paths} | TEMPLATES
    return {name: ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, name=name) for name, source in sources.items()}


def agrees(template: ChatTemplate, messages, least: int, **kwargs) -> bool:
    """Returns whether there are prefixes; asserts that they are the renders."""
    dicts = [message_dict(message) for message in messages]
    try:
        text = template.render(dicts, **kwargs)
    except RowError:
        return False
    found = find_prefixes(template, dicts, least, text, kwargs)
    for count in range(least, len(dicts) + 1 if found else 0):
        assert text[: found.place(count)] + found.end == template.render(dicts[:count], **kwargs), (template.name, count)
        assert text[: found.place(count)] + found.ask == template.render(dicts[:count], True, **kwargs), (template.name, count)
    return found is not None


def test_prefixes_are_the_renders(templates):
    found, choose = set(), random.Random(3)
    for name, template in templates.items():
        for markup in (False, True):
            for kwargs in ({}, {"enable_thinking": False}, {"tools": [{"type": "function", "function": {"name": "add"}}]}):
                messages = random_chat(choose, 6, markup)
                if agrees(template, messages, 1 + (messages[0].role == "system"), **kwargs):
                    found.add(name)
    assert found >= ONE_BY_ONE


@pytest.mark.parametrize("source", OTHERS)
def test_who_looks_ahead_is_not_believed(source):
    chat = random_chat(random.Random(0), 5, markup=False)
    assert not agrees(ChatTemplate(source), chat, 1)


@pytest.mark.parametrize("source", KEPT)
def test_who_does_not_is(source):
    for seed in range(4):
        assert agrees(ChatTemplate(source), random_chat(random.Random(seed), 5, markup=False), 2)


def test_a_mark_in_a_content_is_no_mark():
    chat = [Message("user", "a\U00107ffbb"), Message("assistant", "c")] * 3
    assert not agrees(ChatTemplate(LOOP + END), chat, 1)


def test_long_chats_are_planned_as_turn_by_turn(templates, tiny, monkeypatch):
    """The same spans, the same counts and the same refusals, whichever way prompts are found."""
    choose, compared = random.Random(5), 0
    for name in sorted(ONE_BY_ONE | {"Qwen-Qwen3-0.6B", "phi3.generation"}):
        for markup in (False, True, True):
            plans, messages = [], random_chat(choose, 6, markup)
            for few in (0, 10**6):
                monkeypatch.setattr(spans, "_FEW", few)
                try:
                    plans.append(plan_chat(messages, Rendering(templates[name], {}, tiny), parse_supervise("assistant")))
                except RowError as error:
                    plans.append(str(error))
            assert plans[0] == plans[1], name
            compared += not isinstance(plans[0], str)
    assert compared > 30


@pytest.mark.parametrize("name, examples", [("chatml", 1), ("qwen2_5.generation", 1), ("Qwen-Qwen3-0.6B", 60)])
def test_a_long_chat_takes_few_renders(templates, tiny, monkeypatch, name, examples):
    """One way to see that time does not grow with the square of the turns, where the tokens do not."""
    rendered = []
    plain = ChatTemplate.render

    def counting(self, messages, /, *args, **kwargs):
        rendered.append(len(messages))
        return plain(self, messages, *args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", counting)
    reasoning = "Hm." if examples > 1 else None
    chat = [Message("user", "Hi"), Message("assistant", "Hello", reasoning=reasoning)] * (examples if examples > 1 else 200)
    (built,) = RowBuilder(tiny, templates[name]).build([Conversation(messages=tuple(chat))])
    assert len(built.examples) == examples
    assert sum(rendered) < (10 * len(chat) if examples == 1 else 3 * len(chat) * examples)


def test_contents_of_chats_of_thousands_of_turns_are_told_apart(templates, tiny):
    """So what they hold can be guarded; more than there are marks for is refused."""
    chat = [Message("user", "Hi"), Message("assistant", "Hello")]
    plan = plan_chat(chat * 2000, Rendering(templates["chatml"], {}, tiny), parse_supervise("assistant"))
    assert plan.main.complete and len(plan.main.regions) == 4000 and len(plan.main.spans) == 2000
    with pytest.raises(RowError, match="it has 40,000 contents, more than the 32,759"):
        plan_chat(chat * 20_000, Rendering(templates["chatml"], {}, tiny), parse_supervise("assistant"))
