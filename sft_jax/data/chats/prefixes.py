"""The renders of all beginnings of a conversation at once, for templates that write one message after the other.

A chat of n turns has n prompts, and rendering each of them takes time that grows with the square of n. Most templates
are a loop over the messages, with text before it and an end that is always the same. In their renders the first k
messages are the beginning of the whole render and that end. That a template is such a one is not guessed: what its text
says is checked where it is compiled, and what it looks at is watched while it renders. Whoever looks ahead of the message
that is being written (`loop.last`, `messages[-1]`, `messages | length`) is rendered once for every turn.
"""

import functools
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext

from sft_jax.data.chats.templates import ChatTemplate, Environment, new_environment

_MARK = "\U00107ffb"  # before each message; beyond what sft_jax.data.chats.locate marks with, beside the marks of {% generation %}
_AHEAD = frozenset(("last", "nextitem", "length", "revindex", "revindex0"))  # of a loop
_ONE_BY_ONE = "sft_jax_one_by_one"


class Prefixes(NamedTuple):
    """Where messages begin in the render of all, and what ends the render of the first ones.

    The render of messages [0, k) is `text[:place(k)]` and `end`, or `ask` where it asks for an answer; for k from `least` on.
    """

    text: str
    places: tuple[int, ...]
    skipped: int  # messages that stand before the loop
    end: str
    ask: str

    def place(self, message: int) -> int:
        """Returns where a message begins, which is where the one before it ends."""
        return self.places[message - self.skipped]


def find_prefixes(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], least: int, text: str, kwargs: Mapping[str, Any]
) -> Prefixes | None:
    """Returns the renders of the first `least` messages, and of all longer beginnings of them.

    `text` is the plain render of `messages`. Returns None where it is not shown that all are beginnings of that.
    """
    code = _compile(template.source)
    if code is None:
        return None
    program = jinja2.Template.from_code(_ENVIRONMENT, code, template.globals_in(_ENVIRONMENT))
    found = []
    for prompt in (False, True):
        watch = _Watch(least)
        variables = template.variables(messages, prompt, kwargs) | {"messages": _Messages(messages, watch)}
        try:
            parts = program.render(variables).split(_MARK)
        except MemoryError:
            raise
        except Exception:  # it looks ahead, or fails: then the render of the turn in question says so
            return None
        if watch.broken or watch.skipped is None or watch.skipped > least or len(parts) != len(messages) - watch.skipped + 2:
            return None
        found.append((parts, watch.skipped))
    (parts, skipped), (asking, _) = found
    if "".join(parts) != text or parts[:-1] != asking[:-1]:
        return None
    return Prefixes(text, tuple(itertools.accumulate(map(len, parts[:-1]))), skipped, parts[-1], asking[-1])


class _LooksAhead(Exception):
    """A template has asked for what the beginning of a conversation answers otherwise than the whole."""


class _Watch:
    """What one render may look at, and what it did."""

    def __init__(self, least: int):
        self.least = least
        self.known = least  # messages that may be looked at: those written so far, or the first ones
        self.skipped: int | None = None  # messages that the loop leaves out; None before it
        self.broken = False

    def fail(self) -> _LooksAhead:
        """Returns the error to raise. It is noted too, since some of jinja2's tests take any error for an answer."""
        self.broken = True
        return _LooksAhead()


class _Messages(Sequence):
    """The messages from number `first` on. No list, so that nothing looks at them that is not watched."""

    def __init__(self, messages: Sequence, watch: _Watch, first: int = 0):
        self._messages, self._watch, self._first = messages, watch, first

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.stop is None and key.step is None and (key.start or 0) >= 0:
            return _Messages(self._messages, self._watch, self._first + (key.start or 0))
        if type(key) is int and 0 <= key < self._watch.known - self._first:
            return self._messages[self._first + key]
        raise self._watch.fail()

    def __bool__(self) -> bool:
        if self._first >= self._watch.least:
            raise self._watch.fail()
        return True

    def _refuse(self, *_: Any) -> Any:
        raise self._watch.fail()

    __len__ = __iter__ = __contains__ = __reversed__ = __eq__ = __add__ = __radd__ = __str__ = __repr__ = _refuse
    __hash__ = None

    def one_by_one(self) -> "_OneByOne":
        """Returns what the loop over the messages goes over."""
        if self._watch.skipped is not None:
            raise self._watch.fail()
        self._watch.skipped = self._first
        return _OneByOne(self._messages[self._first :], self._watch)


class _OneByOne:
    """Messages in the order in which a template writes them, each known once it is its turn."""

    def __init__(self, messages: Sequence, watch: _Watch):
        self._messages, self._watch = messages, watch

    def __iter__(self) -> Iterator[Any]:
        for number, message in enumerate(self._messages, self._watch.skipped + 1):
            self._watch.known = max(self._watch.least, number)
            yield message
        self._watch.known = self._watch.least

    def __len__(self) -> int:
        raise self._watch.fail()

    def fail(self) -> _LooksAhead:
        return self._watch.fail()


class _Environment(Environment):
    """Notices what looks ahead in the loop over the messages."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._check(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._check(obj, argument)
        return super().getitem(obj, argument)

    @staticmethod
    def _check(obj: Any, name: Any) -> None:
        if type(obj) is LoopContext and isinstance(obj._iterable, _OneByOne) and name in _AHEAD:
            raise obj._iterable.fail()


def _one_by_one(value: Any) -> _OneByOne:
    if not isinstance(value, _Messages):
        raise _LooksAhead
    return value.one_by_one()


_ENVIRONMENT = new_environment(_Environment)
_ENVIRONMENT.filters[_ONE_BY_ONE] = _one_by_one


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> types.CodeType | None:
    """Returns the code of a template that puts _MARK before each message and behind the last one.

    Returns None where it has no loop whose body, and after it no end, that could not but be as described above.
    """
    tree = _ENVIRONMENT.parse(source)
    places = [place for place, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if not places or tree.find((nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block)):
        return None
    loop, end = tree.body[places[-1]], nodes.Template(tree.body[places[-1] + 1 :])
    plain = loop.test is None and not loop.else_ and not loop.recursive and isinstance(loop.target, nodes.Name)
    if not plain or loop.find(nodes.Break) or _passes_loop_on(loop) or not _is_constant(end, tree):
        return None
    loop.iter = nodes.Filter(loop.iter, _ONE_BY_ONE, [], [], None, None)
    for body, place in ((loop.body, 0), (tree.body, places[-1] + 1)):
        body.insert(place, nodes.Output([nodes.TemplateData(_MARK)]))
    for node in tree.find_all(nodes.Node):
        node.lineno = node.lineno or 1
    return _ENVIRONMENT.compile(tree.set_environment(_ENVIRONMENT))


def _passes_loop_on(loop: nodes.For) -> bool:
    """Returns whether `loop` is used otherwise than by its attributes, which are watched."""
    known = [node.node for node in loop.find_all((nodes.Getattr, nodes.Getitem))]
    return any(name.name == "loop" and not any(name is node for node in known) for name in loop.find_all(nodes.Name))


def _is_constant(end: nodes.Template, tree: nodes.Template) -> bool:
    """Returns whether `end` reads nothing that the loop may have changed: neither namespaces nor macros, nor what has them."""
    values: dict[str, list[nodes.Node]] = {}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            values.setdefault(assign.target.name, []).append(assign.node)
    stored = [name for name in tree.find_all(nodes.Name) if name.ctx != "load"]
    others = {name.name for name in stored if not any(name is each.target for each in tree.find_all(nodes.Assign))}
    others |= {macro.name for macro in tree.find_all(nodes.Macro)} | {"joiner", "cycler", "caller", "self"}

    def constant(node: nodes.Node, above: frozenset[str]) -> bool:
        names = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
        return all(
            name.name not in others
            and all(
                name.name in above or not (isinstance(value, made) or value.find(made)) and constant(value, above | {name.name})
                for value in values.get(name.name, ())
            )
            for name in names
        )

    made = (nodes.Call, nodes.Filter)  # an object that may change, or what is not computed at once
    return constant(end, frozenset())
