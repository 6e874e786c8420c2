"""What a worker process does with rows: read the format, render, tokenise, and hand examples back.

For stores they come back as flat arrays, for looking at them one by one with their texts; all else is the same code.
"""

import datetime
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from sft_jax.config import ColumnsConfig
from sft_jax.data.chats.chat import build_rows
from sft_jax.data.chats.templates import ChatTemplate
from sft_jax.data.examples import BadRow, BuiltRow, RowError
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.sources.parts import Unparsed
from sft_jax.data.stores.store import ROLES, Encoded, encode
from sft_jax.data.tokenizers.tokens import load_stored_tokenizer

TARGET = f"{__name__}:make_builder"  # for WorkerPool
DETAILS_TARGET = f"{__name__}:make_detailer"
_ROLE_CODES = {role: code for code, role in enumerate(ROLES)} | {"developer": ROLES.index("system")}


class SetOptions(NamedTuple):
    """How the rows of one data set are read."""

    format: str
    columns: ColumnsConfig
    supervise: str


class Setup(NamedTuple):
    """What every worker has."""

    tokenizer_folder: str  # written by store_tokenizer
    template: tuple[str, str] | None  # source, name for messages
    now: datetime.datetime  # at which templates think that they are rendered
    template_kwargs: dict[str, Any]
    allow_special_tokens: bool
    sets: tuple[SetOptions, ...]
    checked: bool = False  # the template compiles and renders in good time, so workers may do it before they are ready


class Item(NamedTuple):
    """A row to build. With `row` None only the template is compiled and probed, which is untrusted work too."""

    set_index: int
    number: int
    row: dict[str, Any] | Unparsed | None


class Built(NamedTuple):
    """What became of some rows of one data set."""

    encoded: Encoded
    bad: list[tuple[int, str]]  # (row number, reason)
    kinds: Counter[str]  # how rows became examples, see sft_jax.data.examples.BuiltRow
    counts: Counter[str]
    unused_fields: Counter[str]  # rows with a field that nothing reads, by its name
    read_clock: bool  # the template has asked for the date for one of them


class _Results(NamedTuple):
    """What became of rows, one by one."""

    rows: list[tuple[int, BuiltRow | BadRow]]
    bad: list[tuple[int, str]]  # rows that their format does not read, (row number, reason)
    unused: Counter[str]
    read_clock: bool


def make_builder(setup: Setup) -> Callable[[list[Item]], Built]:
    """Returns the function that builds a list of rows, all of one data set."""
    return _with_results(setup, _collect)


def make_detailer(setup: Setup) -> Callable[[list[Item]], list[tuple[int, BuiltRow | BadRow]]]:
    """Returns the function that builds a list of rows, all of one data set, as (row number, what it became) in order."""
    return _with_results(setup, _in_order)


def _with_results(setup: Setup, finish: Callable[[_Results], Any]) -> Callable[[list[Item]], Any]:
    tokenizer = load_stored_tokenizer(setup.tokenizer_folder)
    template: list[ChatTemplate] = []

    def compiled() -> ChatTemplate | None:
        if setup.template is not None and not template:
            source, name = setup.template
            template.append(ChatTemplate(source, tokenizer.special_tokens, name=name, now=setup.now))
        return template[0] if template else None

    def build(items: list[Item]) -> Any:
        chat_template = compiled()
        if chat_template is not None:
            chat_template.read_clock = False  # it is of these rows that it is told
        numbers, conversations, bad = [], [], []
        unused: Counter[str] = Counter()
        options = setup.sets[items[0].set_index]
        for item in items:
            if item.row is None:
                continue
            try:
                row = item.row.parse(item.row.data) if isinstance(item.row, Unparsed) else item.row
                conversations.append(FORMATS[options.format].read(row, options.columns))
                numbers.append(item.number)
                unused.update(FORMATS[options.format].unread_fields(row, options.columns))
            except RowError as error:
                bad.append((item.number, str(error)))
        results = build_rows(
            conversations, tokenizer, chat_template, supervise=options.supervise,
            template_kwargs=setup.template_kwargs, allow_special_tokens=setup.allow_special_tokens,
        )  # fmt: skip
        read_clock = chat_template is not None and chat_template.read_clock
        return finish(_Results(list(zip(numbers, results, strict=True)), bad, unused, read_clock))

    if setup.checked:
        for index in range(len(setup.sets)):
            build([Item(index, 0, None)])
    return build


def _in_order(results: _Results) -> list[tuple[int, BuiltRow | BadRow]]:
    unread = [(number, BadRow(reason)) for number, reason in results.bad]
    return sorted(results.rows + unread, key=lambda entry: entry[0])


def _collect(results: _Results) -> Built:
    examples, bad, kinds, counts = [], list(results.bad), Counter(), Counter()
    for number, result in results.rows:
        if isinstance(result, BadRow):
            bad.append((number, result.reason))
            continue
        kinds[result.kind] += 1
        counts.update(result.counts)
        for example in result.examples:  # each has a supervised token behind its first
            roles = [_ROLE_CODES.get(role, 0) for role in example.turn_roles]
            examples.append((number, example.ids, example.weights, example.turn, example.turn_starts, roles))
    return Built(encode(examples), sorted(bad), kinds, counts, results.unused, results.read_clock)
