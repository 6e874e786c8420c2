"""Chat templates: jinja2 rendered as transformers renders it, without importing transformers.

Templates come from model repositories and are not trusted: the sandbox keeps them from the interpreter, and whoever
renders in a loop does so in a process that is watched for time and memory.
"""

import contextlib
import contextvars
import datetime
import functools
import itertools
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from sft_jax.data.chats.builtin_templates import TEMPLATES
from sft_jax.data.examples import RowError
from sft_jax.data.formats.tool_calls import CALL_FORMS, CallForm, call_dict
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError, did_you_mean

__all__ = ["TEMPLATES", "ChatTemplate", "message_dict", "resolve_template", "template_source"]


class ChatTemplate:
    """A compiled chat template and the special tokens that it reads.

    Time stands still in it: `strftime_now` gives the moment at which the first object of the run was made, so that
    all renders of a run agree on the date. `read_clock` says whether a render has asked for it.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        name: str = "the chat template",
        now: datetime.datetime | None = None,
    ):
        """Compiles `source`. `special_tokens` maps "bos_token", "eos_token", ... to text; `name` is for messages.

        Raises UserError where the template is not valid jinja2.
        """
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.name = name
        self.now = now or datetime.datetime.now()
        self.read_clock = False
        self.marks_generation = _BLOCK.search(source) is not None
        try:
            code = _compile(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{name}: is not a valid chat template ({error}); check data.chat_template.") from error
        self._compiled = jinja2.Template.from_code(_ENVIRONMENT, code, self.globals_in(_ENVIRONMENT))

    def __reduce__(self):
        return functools.partial(ChatTemplate, name=self.name, now=self.now), (self.source, self.special_tokens)

    def globals_in(self, environment: "Environment") -> dict[str, Any]:
        """Returns the names that the template knows in an environment, whoever renders it."""
        return {**environment.globals, "strftime_now": self._strftime_now}

    def variables(self, messages: Sequence[Mapping[str, Any]], prompt: bool, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a render of `messages` is given."""
        return {
            "messages": messages,
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **kwargs,
            "add_generation_prompt": prompt,
        }

    def _strftime_now(self, form: str) -> str:
        self.read_clock = True
        return self.now.strftime(form)

    @contextlib.contextmanager
    def probed(self) -> Iterator[None]:
        """Renders in it are of no row, so `read_clock` stays as it is."""
        before = self.read_clock
        try:
            yield
        finally:
            self.read_clock = before

    def render(self, messages: Sequence, /, add_generation_prompt: bool = False, **kwargs: Any) -> str:
        """Returns the text of a conversation.

        Args:
            messages: dicts as templates read them, or objects of sft_jax.data.formats.conversation.Message.
            add_generation_prompt: end with what a server puts before an answer.
            kwargs: the run's template arguments, such as enable_thinking; they win over special tokens.

        Raises RowError with the template's own message where it refuses the conversation or fails.
        """
        dicts = [message if isinstance(message, Mapping) else message_dict(message) for message in messages]
        try:
            return self._compiled.render(self.variables(dicts, add_generation_prompt, kwargs))
        except MemoryError:
            raise
        except Exception as error:  # a template can fail in every way that Python can
            reason = str(error).strip() or type(error).__name__
            raise RowError(f"{self.name} does not accept the conversation: {reason}") from error

    def generated(self, messages: Sequence[Mapping[str, Any]], text: str, /, **kwargs: Any) -> list[tuple[int, int]] | None:
        """Returns the characters of `text`, the render of `messages`, that stand in `{% generation %}`.

        None where the template has no such block. Raises RowError where it cannot be told what they are.
        """
        if not self.marks_generation:
            return None
        token = _marking.set(True)
        try:
            marked = self.render(messages, False, **kwargs)
        finally:
            _marking.reset(token)
        parts = _MARKS.split(marked)
        marks = _MARKS.findall(marked)
        if "".join(parts) != text or marks != [_BEGIN, _END] * (len(marks) // 2):
            raise RowError(f"{self.name}: what stands in its {{% generation %}} cannot be told from the render; take the block out.")
        ends = list(itertools.accumulate(map(len, parts)))
        return list(zip(ends[:-1:2], ends[1::2], strict=True))


def message_dict(message, form: CallForm = CALL_FORMS[0]) -> dict[str, Any]:
    """Returns a message as templates read it, calls of tools in the form that the template wants.

    Reasoning has the names under which transformers passes it on.
    """
    result = {"role": message.role, "content": message.content or ""}
    if message.calls:
        result["content"] = message.content or form.content
        result["tool_calls"] = [call_dict(call, form) for call in message.calls]
    if message.reasoning is not None:
        result["reasoning_content"] = result["thinking"] = message.reasoning
    if message.call_id is not None:
        result["tool_call_id"] = message.call_id
    if message.name is not None:
        result["name"] = message.name
    return result


def resolve_template(setting: str, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Returns the template that `data.chat_template` names, or None where rows are not to go through one.

    "auto" is the tokenizer's own (None where it has none), "none" is none; else a built-in name or a file. Raises
    UserError for what is neither.
    """
    found = template_source(setting, tokenizer)
    return None if found is None else ChatTemplate(found[0], tokenizer.special_tokens, name=found[1])


def template_source(setting: str, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Returns (source, name for messages) of the template that `resolve_template` compiles, or None.

    Compiling evaluates constant expressions, so where a template is not trusted that too is done under watch.
    """
    if setting == "none":
        return None
    if setting == "auto":
        source, name = tokenizer.chat_template, "the model's chat template"
    elif setting in TEMPLATES:
        source, name = TEMPLATES[setting], f"the chat template '{setting}'"
    else:
        source, name = _read(setting), setting
    return None if source is None else (source, name)


def _read(setting: str) -> str:
    path = Path(setting).expanduser()
    if not path.is_file():
        kind = "there is no such file" if path.suffix or len(path.parts) > 1 else "is no chat template"
        known = did_you_mean(setting, ["auto", "none", *TEMPLATES])
        raise UserError(f"data.chat_template: '{setting}': {kind}; {known}, or a file.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: {path} cannot be read ({error}); give a UTF-8 jinja file.") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what the model writes. `ChatTemplate.generated` has it marked, other renders pass it on."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller) -> str:
        return f"{_BEGIN}{caller()}{_END}" if _marking.get() else caller()


_BEGIN, _END = "\U00107ffc", "\U00107ffd"  # beyond what sft_jax.data.chats.locate marks with, before the aliases of the guard
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
_BLOCK = re.compile(r"\{%[-+]?\s*generation\b")
_marking: contextvars.ContextVar[bool] = contextvars.ContextVar("marking", default=False)


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs) -> dict:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` that takes no private names."""

    def __init__(*args, **kwargs):  # no parameter is called self, so that namespace(self=...) works
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}: its name begins with _")


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with a short way to what templates read dozens of times: `message.role`, `loop.last`, `split`."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and not hasattr(dict, attribute):
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if attribute in _HARMLESS.get(type(obj), ()):
            return getattr(obj, attribute)
        if type(obj) is _Namespace and not attribute.startswith("_"):  # a namespace has what templates put there, and no methods
            try:
                value = getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
            return value if not isinstance(value, types.MethodType) else super().getattr(obj, attribute)
        return super().getattr(obj, attribute)


_HARMLESS = {
    jinja2.runtime.LoopContext: frozenset(["index", "index0", "first", "last", "length", "previtem", "nextitem"]),
    str: frozenset(["startswith", "endswith", "split", "strip", "lstrip", "rstrip", "replace"]),
}


def new_environment(kind: type[Environment] = Environment) -> Environment:
    """Returns an environment equal to that of transformers' `apply_chat_template` (transformers 5)."""
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> types.CodeType:
    return _ENVIRONMENT.compile(source)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as transformers writes it: jinja2's own filter escapes HTML, sorts keys and escapes what is not ASCII."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_ENVIRONMENT = new_environment()
