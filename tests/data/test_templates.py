"""Chat templates: rendering identity with transformers, built-in ones, and what a template must not do."""

import datetime
import json
import pickle

import pytest

from sft_jax.data.chats.templates import TEMPLATES, ChatTemplate, resolve_template
from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import Message
from sft_jax.errors import UserError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    Message("system", "Be brief."),
    Message("user", "Hello"),
    Message("assistant", "Hi"),
    Message("user", "Bye"),
]


def reference(source, messages, prompt, **kwargs):
    """Returns the text of transformers, or the message of its error."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    try:
        texts, _ = utils.render_jinja_template([messages], chat_template=source, add_generation_prompt=prompt, **kwargs)
        return texts[0]
    except Exception as error:
        return f"error: {error}"


def rendered(template, messages, prompt, **kwargs):
    try:
        return template.render(messages, prompt, **kwargs)
    except RowError as error:
        return f"error: {str(error).removeprefix('the chat template does not accept the conversation: ')}"


def test_renders_are_those_of_transformers(assets):
    """Every template of the assets on every conversation there, tools included."""
    folder = assets / "chat_templates"
    chats = [json.loads(path.read_text()) for path in sorted((folder / "conversations").glob("*.json"))]
    thoughts = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "c", "thinking": "c"},
    ]
    chats.append({"messages": thoughts})
    equal = 0
    for path in sorted(folder.glob("*/*.jinja")):
        source = path.read_text()
        template = ChatTemplate(source, SPECIAL)
        for chat in chats:
            for prompt in (False, True):
                kwargs = {"tools": chat.get("tools"), "builtin_tools": ["code"], "date_string": "today"}
                want = reference(source, chat["messages"], prompt, **SPECIAL, **kwargs)
                assert rendered(template, chat["messages"], prompt, **kwargs) == want, (path.name, prompt)
                equal += not want.startswith("error")
    assert equal > 200


def test_cases_of_llama_cpp(assets):
    cases = json.loads((assets / "chat_templates" / "cases.json").read_text())
    assert len(cases) == 25
    for case in cases:
        template = ChatTemplate(case["template"], {name: case[name] for name in ("bos_token", "eos_token")})
        assert template.render(case["messages"], case["add_generation_prompt"]) == case["expected"], case["name"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é&\'>"}]'),
        ("{{ messages[0] | tojson(indent=1, ensure_ascii=True) }}", None),
        ("{% for m in messages %}\n  {% if loop.first %}\n  x\n  {% endif %}\n{% endfor %}", "  x\n"),
        ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c", "ab<é&'>c"),
        ("{{ messages[0].missing is defined }}{{ messages[0].content.upper() }}", "False<É&'>"),
        ("{{ dict(a=1) }}{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}", "{'a': 1}2"),
        ("{{ messages[0].items() | list | length }}{{ messages[0].get('role') }}", "2user"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_environment(source, text):
    """What templates use of jinja2, each as transformers has it."""
    messages = [{"role": "user", "content": "<é&'>"}]
    got = ChatTemplate(source, {}).render(messages)
    assert got == reference(source, messages, False)
    assert text is None or got == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% set n = namespace(_x=1) %}",
        "{% set n = namespace() %}{% set n._y = 1 %}",
        "{{ dict.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_sandbox(source):
    """A template cannot reach the interpreter, nor change the row."""
    messages = [{"role": "user", "content": "x"}]
    assert rendered(ChatTemplate(source, {}), messages, False).partition(":")[0] in ("", "error")
    assert messages == [{"role": "user", "content": "x"}]


def test_the_template_s_own_message_is_in_the_error():
    template = ChatTemplate("{{ raise_exception('No system here') }}", {}, name="file.jinja")
    with pytest.raises(RowError, match="file.jinja does not accept the conversation: No system here"):
        template.render(CHAT)
    with pytest.raises(RowError, match="'bos_token' is undefined"):
        ChatTemplate("{{ bos_token + messages[0].content }}", {}).render(CHAT)
    with pytest.raises(RowError, match="division by zero"):
        ChatTemplate("{{ 1 / 0 }}", {}).render(CHAT)


def test_arguments_win_over_special_tokens_but_not_over_the_prompt():
    template = ChatTemplate("{{ bos_token }}{{ add_generation_prompt }}", SPECIAL)
    assert template.render(CHAT, True) == "<s>True"
    assert template.render(CHAT, bos_token="B") == "BFalse"


def test_pickling_keeps_the_time():
    then = datetime.datetime(2020, 2, 3)
    template = pickle.loads(
        pickle.dumps(ChatTemplate("{{ strftime_now('%d %b %Y') }}{{ eos_token }}", SPECIAL, now=then))
    )
    assert template.render(CHAT) == "03 Feb 2020</s>"


WANTED = {
    "chatml": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Hi </s><s>[INST] Bye [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    "zephyr": "<s><|system|>\nBe brief.</s>\n<|user|>\nHello</s>\n"
    "<|assistant|>\nHi</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHello"
    "\n\n### Response:\nHi</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "vicuna": "<s>Be brief. USER: Hello ASSISTANT: Hi</s>USER: Bye ASSISTANT:",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in(name):
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(CHAT, True) == WANTED[name]


class WithTemplate:
    chat_template = "{{ bos_token }}!"
    special_tokens = SPECIAL


class WithoutTemplate:
    chat_template = None
    special_tokens = SPECIAL


def test_resolve(tmp_path):
    assert resolve_template("auto", WithTemplate()).render(CHAT) == "<s>!"
    assert resolve_template("auto", WithoutTemplate()) is None
    assert resolve_template("none", WithTemplate()) is None
    assert resolve_template("chatml", WithTemplate()).render(CHAT[1:2]) == "<s><|im_start|>user\nHello<|im_end|>\n"
    (tmp_path / "mine.jinja").write_text("{{ eos_token }}?")
    assert resolve_template(str(tmp_path / "mine.jinja"), WithTemplate()).render(CHAT) == "</s>?"


def test_resolve_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="data.chat_template: 'chatlm': is no chat template; did you mean 'chatml'"):
        resolve_template("chatlm", WithTemplate())
    with pytest.raises(UserError, match="there is no such file"):
        resolve_template(str(tmp_path / "missing.jinja"), WithTemplate())
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="bad.jinja: is not a valid chat template"):
        resolve_template(str(tmp_path / "bad.jinja"), WithTemplate())
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        resolve_template(str(tmp_path / "binary.jinja"), WithTemplate())
