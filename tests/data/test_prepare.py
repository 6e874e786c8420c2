"""Preparing: from files of rows to streams, against the parts called one by one; reuse, damage, and bad input."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from row_kinds import KINDS
from sentencepiece import sentencepiece_model_pb2
from synthetic_data import documents_of

from sft_jax.config import parse_config
from sft_jax.data import build, stores, tokenizer_cache
from sft_jax.data.cache import default_cache
from sft_jax.data.chat import build_rows
from sft_jax.data.conversation import Conversation, Message
from sft_jax.data.prepare import prepare
from sft_jax.data.templates import resolve_template
from sft_jax.data.tokenizer_cache import open_tokenizer
from sft_jax.data.tokens import load_tokenizer
from sft_jax.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model directory whose tokenizer is a small SentencePiece model: read without transformers."""
    folder = tmp_path_factory.mktemp("model")
    corpus = [
        f"The {a} {b} says {i * 7919 % 1000} to the {b} of {a}."
        for i, (a, b) in enumerate([("red", "fox"), ("old", "owl")] * 50)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(str(model))


def pairs(count, seed=0):
    rng = np.random.default_rng(seed)
    words = ["red", "fox", "old", "owl", "says", "9", "é"]

    def text(most):
        return " ".join(words[i] for i in rng.integers(0, len(words), rng.integers(1, most)))

    return [{"prompt": f"Question {i}: {text(20)}?", "completion": " " + text(12)} for i in range(count)]


def chats(count):
    return [
        {"messages": [turn("user", f"What says fox {i}?"), turn("assistant", f"To the owl: {i * i}.")]}
        for i in range(count)
    ]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def write(path: Path, rows) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path, model):
    """Runs prepare with a cache of its own, one worker and given keys of `data`."""
    lines: list[str] = []

    def go(train, *, model_path=None, options=None, **data):
        fixed = {"cache_dir": str(tmp_path / "cache"), "max_length": 128, "workers": 1, "chat_template": "none"}
        config = parse_config({"model": {"path": "m"}, "data": {"train": train, **fixed, **data}}).data
        return prepare(config, model_path=str(model_path or model), log=lines.append, **(options or {}))

    go.lines = lines
    go.cache = tmp_path / "cache"
    return go


def documents_of_sets(stream) -> dict[str, int]:
    return {name: counts.documents for name, counts in stream.set_counts(stream.total_rows).items()}


def documents_by_line(stream) -> dict[tuple[str, int, int], tuple[list[int], list[float]]]:
    batch = stream.read(0, stream.total_rows)
    found = {}
    for row in range(stream.total_rows):
        for number, ids, weights in documents_of(batch, row):
            name, file, line, turn = stream.identity(number)
            assert found.setdefault((name, line, turn), (ids, weights)) == (ids, weights)
    return found


def test_rows_of_every_kind_become_the_same_documents(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    rows = pairs(40)
    expected = None
    for kind in ("jsonl", "csv", "parquet", "array_record", "hf", "tfds", "memory"):
        (tmp_path / kind).mkdir()
        stream = run(KINDS[kind](tmp_path / kind, rows)).train
        found = [(ids.tolist(), weights.tolist()) for _, ids, weights in map(stream.document, range(stream.document_count))]
        expected = expected or found
        assert found == expected and len(found) == 40
    (copy,) = (tmp_path / "cache/remote").rglob("*.jsonl")
    assert any(f"copying {copy.stat().st_size:,} bytes to {copy}" in line for line in run.lines)


def test_documents_are_what_build_rows_makes_of_each_row(run, tmp_path, tokenizer):
    """Through workers, chunks, store, memmap, packing and rows; against one direct call for each row."""
    plain, chat = pairs(150), chats(20)
    train = {"plain": write(tmp_path / "plain.jsonl", plain), "chat": write(tmp_path / "chat.jsonl", chat)}
    data = run(train, eval=write(tmp_path / "eval.jsonl", pairs(10, seed=1)), chat_template="chatml", workers=3)
    template = resolve_template("chatml", tokenizer)
    expected = {}
    conversations = {
        "plain": [Conversation(prompt=row["prompt"], completion=row["completion"]) for row in plain],
        "chat": [
            Conversation(messages=tuple(Message(m["role"], m["content"]) for m in row["messages"])) for row in chat
        ],
    }
    for name, items in conversations.items():
        for line, conversation in enumerate(items, start=1):
            (built,) = build_rows([conversation], tokenizer, template)
            for example in built.examples:
                expected[name, line, example.turn] = example.ids.tolist(), example.weights[1:].tolist()
    assert documents_by_line(data.train) == expected
    assert list(data.eval) == ["eval"] and data.eval["eval"].examples == 10
    assert data.tokenizer.fingerprint == tokenizer.fingerprint


def test_a_document_ends_with_eos_and_its_completion_is_supervised(run, tmp_path, tokenizer):
    """Without a template, from the text alone: what inference feeds, then what it should give."""
    rows = pairs(5)
    data = run(write(tmp_path / "rows.jsonl", rows))
    for (_, line, _), (ids, weights) in documents_by_line(data.train).items():
        row = rows[line - 1]
        prompt = [*tokenizer.plain_prefix, *tokenizer.encode(row["prompt"])]
        assert ids[: len(prompt)] == prompt and ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids[len(tokenizer.plain_prefix) : -1]) == row["prompt"] + row["completion"]
        assert weights == [0.0] * (len(prompt) - 1) + [1.0] * (len(ids) - len(prompt))


def test_the_number_of_workers_changes_nothing(run, tmp_path):
    train = write(tmp_path / "rows.jsonl", pairs(200))
    one = run(train, workers=1)
    three = run(train, workers=3, cache_dir=str(tmp_path / "other"))
    assert one.fingerprints == three.fingerprints
    for a, b in zip(one.train.read(0, one.train.total_rows), three.train.read(0, one.train.total_rows), strict=True):
        assert (a == b).all()


# ---- reuse


@pytest.fixture
def no_workers(monkeypatch):
    """Fails the test where rows are prepared again."""

    def refuse(*args, **kwargs):
        raise AssertionError("rows are prepared again")

    def forbid():
        monkeypatch.setattr(stores, "WorkerPool", refuse)

    return forbid


def test_what_comes_after_the_store_prepares_nothing_again(run, tmp_path, no_workers):
    rows = write(tmp_path / "rows.jsonl", pairs(30))
    base = run(rows)
    no_workers()
    plans = set()
    for options in (
        {}, {"max_length": 127}, {"max_segments": 2}, {"packing": False}, {"overlength": "drop", "max_length": 30},
        {"overlength": "truncate_left", "max_length": 30},
    ):  # fmt: skip
        data = run(rows, **options)
        assert data.fingerprints["tokens"] == base.fingerprints["tokens"]
        plans.add(data.fingerprints["plan"])
    for options in ({"seed": 1}, {"normalize": "examples"}):
        plans.add(run(rows, options=options).fingerprints["plan"])
    assert len(plans) == 8
    for options in ({"row_timeout": 3.0}, {"row_memory_mb": 99}, {"workers": 2}, {"bad_rows": "skip"}):
        assert run(rows, **options).fingerprints == base.fingerprints
    for options in ({"epochs": 2.5}, {"rows": 77}):
        assert run(rows, options=options).fingerprints == base.fingerprints
    assert any("were prepared before" in line for line in run.lines)


def test_what_comes_before_the_store_prepares_again(run, tmp_path, model, monkeypatch):
    path = tmp_path / "rows.jsonl"
    content = chats(4)
    base = run(write(path, content), chat_template="chatml")

    class PreparedAgain(Exception):
        pass

    folders = set()

    def pool(*args):
        raise PreparedAgain

    def opened(folder, suffix):
        folders.add(folder.name)
        return real_open(folder, suffix)

    real_open = stores.open_store
    monkeypatch.setattr(stores, "WorkerPool", pool)
    monkeypatch.setattr(stores, "open_store", opened)

    def new(train=None, **options):
        before = len(folders)
        with pytest.raises(PreparedAgain):
            run(train or str(path), **{"chat_template": "chatml", **options})
        assert len(folders) == before + 1  # a store of its own, not that of another change

    template = tmp_path / "template.jinja"
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template.write_text(text)
    new(chat_template=str(template))
    template.write_text(text.replace(": ", " - "))  # the same file, another template
    new(chat_template=str(template))
    new(chat_template="none")
    new(chat_template_kwargs={"enable_thinking": True})
    new(supervise="all")
    new(supervise="last")
    new(allow_special_tokens_in_content=True)
    new(format="messages")
    new([{"path": str(path), "columns": {"messages": "messages"}}])
    other = tmp_path / "other_model"  # whose tokenizer differs in one piece
    other.mkdir()
    proto = sentencepiece_model_pb2.ModelProto.FromString((model / "tokenizer.model").read_bytes())
    proto.pieces[-1].piece += "x"
    (other / "tokenizer.model").write_bytes(proto.SerializeToString())
    new(model_path=other)
    content[2]["messages"][0]["content"] += "!"
    new(write(path, content))
    new(write(path, content[::-1]))  # the order of rows is part of the data
    assert run(write(path, chats(4)), chat_template="chatml").fingerprints == base.fingerprints  # back again


def test_a_store_without_failures_is_used_under_any_limits(run, tmp_path, no_workers):
    rows = write(tmp_path / "rows.jsonl", chats(4))
    base = run(rows, chat_template="chatml", row_timeout=20.0, row_memory_mb=500)
    no_workers()
    for options in ({"row_timeout": 30.0}, {"row_timeout": 0.5}, {"row_memory_mb": 900}, {"row_memory_mb": 9}):
        assert run(rows, chat_template="chatml", **options).fingerprints == base.fingerprints


def test_a_row_that_ran_into_a_limit_is_tried_again_under_another(run, tmp_path, wild):
    """And the limits that a run began with lead back to its rows."""
    slow = "{% for i in range(6000) %}{% for j in range(6000) %}{% endfor %}{% endfor %}"
    rows, options = wild(slow)
    options |= {"bad_rows": "skip", "row_memory_mb": 500}
    short = run(rows, **{**options, "row_timeout": 0.8})
    assert short.train.examples == 11
    (group,) = short.report["train"]["sets"]["train"]["rows_left_out"]["reasons"]
    assert "data.row_timeout" in group["reason"]
    with pytest.raises(UserError, match=r"rows\.jsonl:5: .*data\.row_timeout"):  # it is no silent loss either
        run(rows, **{**options, "row_timeout": 0.8, "bad_rows": "error"})
    long = run(rows, **{**options, "row_timeout": 120.0})
    assert long.train.examples == 12 and long.report["train"]["sets"]["train"]["rows_left_out"]["total"] == 0
    assert long.fingerprints["plan"] != short.fingerprints["plan"]
    assert run(rows, **{**options, "row_timeout": 0.8}).fingerprints == short.fingerprints
    fresh = run(rows, **{**options, "row_timeout": 120.0, "cache_dir": str(tmp_path / "fresh")})
    assert fresh.fingerprints == long.fingerprints


DATED = (
    "{{ strftime_now('%d %B %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def first_text(data) -> str:
    return data.tokenizer.decode(data.train.document(0)[1].tolist())


def test_a_template_that_writes_the_date_makes_other_rows_on_another_day(run, tmp_path, no_workers):
    """Other tokens have other fingerprints, and the day on which a run began leads back to its rows."""
    template = tmp_path / "template.jinja"
    template.write_text(DATED)
    rows = write(tmp_path / "rows.jsonl", chats(4))
    first = run(rows, chat_template=str(template), options={"rendered_at": "2026-01-30"})
    second = run(rows, chat_template=str(template), options={"rendered_at": "2026-01-31"})
    assert "30 January 2026" in first_text(first) and "31 January 2026" in first_text(second)
    for name in ("tokens", "plan"):
        assert first.fingerprints[name] != second.fingerprints[name]
    today = run(rows, chat_template=str(template))
    assert today.rendered_at == today.report["rendered_at"] not in ("2026-01-30", "2026-01-31")
    no_workers()
    again = run(rows, chat_template=str(template), options={"rendered_at": first.rendered_at})
    assert again.fingerprints == first.fingerprints and first_text(again) == first_text(first)
    assert f"{template} writes the date: 2026-01-30, which is data.date or the day on which this run began." in run.lines


def test_the_date_can_be_set(run, tmp_path):
    """For runs that begin; one that goes on keeps the day on which it began."""
    template = tmp_path / "template.jinja"
    template.write_text(DATED)
    rows = write(tmp_path / "rows.jsonl", chats(4))
    pinned = run(rows, chat_template=str(template), date="2024-07-26")
    assert "26 July 2024" in first_text(pinned) and pinned.rendered_at == pinned.report["rendered_at"] == "2024-07-26"
    goes_on = run(rows, chat_template=str(template), date="2024-07-26", options={"rendered_at": "2026-01-30"})
    assert "30 January 2026" in first_text(goes_on)


def test_a_template_that_could_write_the_date_and_does_not_is_rendered_once(run, tmp_path, no_workers):
    template = tmp_path / "template.jinja"
    template.write_text(DATED.replace("{{ strftime", "{{ day if day is defined else strftime"))
    rows = write(tmp_path / "rows.jsonl", chats(4))
    options = {"chat_template": str(template), "chat_template_kwargs": {"day": "Monday"}}
    first = run(rows, **options, options={"rendered_at": "2026-01-30"})
    no_workers()
    assert run(rows, **options, options={"rendered_at": "2026-01-31"}).fingerprints == first.fingerprints


def test_a_token_that_the_model_has_not_is_named_with_its_row(run, tmp_path, tokenizer):
    rows = [{"prompt": "fox", "completion": " owl"}] * 3 + [{"prompt": "\u00e9\uffff", "completion": " owl"}] * 100
    ids = [tokenizer.encode(row["prompt"] + row["completion"]) for row in rows]
    size = max(*ids[0], tokenizer.eos_id) + 1
    assert size <= max(ids[3])
    path = write(tmp_path / "rows.jsonl", rows)
    token = f"token {tokenizer.decode([max(ids[3])])!r} has the id {max(ids[3])}"
    message = fails(run, path, options={"vocab_size": size})
    assert f"{path}:4: {token}" in message and f"below {size}" in message and "tokenizer" in message
    run(path, options={"vocab_size": max(ids[3]) + 1})
    with pytest.raises(UserError, match=rf"rows\.jsonl:4: {token}"):  # prepared already, with a model that has it
        run(path, options={"vocab_size": max(ids[3])})


def test_a_file_that_moved_is_the_same_data_under_its_new_name(run, tmp_path, no_workers):
    first = tmp_path / "rows.jsonl"
    base = run(write(first, pairs(5)))
    no_workers()
    first.rename(tmp_path / "moved.jsonl")
    data = run(str(tmp_path / "moved.jsonl"))
    assert data.fingerprints == base.fingerprints
    assert data.train.identity(0)[1] == str(tmp_path / "moved.jsonl")


def test_a_token_that_the_tokenizer_has_may_be_named_later(run, tmp_path, assets):
    """It is counted then, in a store that was made for the name."""
    rows = write(tmp_path / "rows.jsonl", chats(4))
    model = assets / "models" / "stories260k"
    base = run(rows, model_path=model, chat_template="chatml", max_length=300)
    (token,) = [text for text, number in base.tokenizer.added_tokens.items() if number == base.tokenizer.eos_id]
    named = run(rows, model_path=model, chat_template="chatml", max_length=300, add_tokens=token)
    assert named.tokenizer.fingerprint == base.tokenizer.fingerprint
    assert set(named.report["train"]["sets"]["train"]["added_tokens"]) == {token}


def test_the_code_version_is_part_of_the_fingerprint(run, tmp_path, monkeypatch):
    from sft_jax.data import fingerprint

    rows = write(tmp_path / "rows.jsonl", pairs(3))
    base = run(rows)
    monkeypatch.setattr(fingerprint, "source_hash", lambda: "another version")
    assert run(rows).fingerprints["tokens"] != base.fingerprints["tokens"]


def test_a_damaged_store_is_named_and_made_again(run, tmp_path):
    rows = write(tmp_path / "rows.jsonl", pairs(30))
    base = run(rows)
    (store,) = (run.cache / "tokens").iterdir()
    ids = store / "00000" / "ids"
    content = bytearray(ids.read_bytes())
    content[11] ^= 1
    ids.write_bytes(content)
    data = run(rows)
    assert any("damaged" in line and "00000/ids" in line for line in run.lines)
    assert (data.train.read(0, 3).tokens == base.train.read(0, 3).tokens).all()
    ids.write_bytes(content[:-2])
    run(rows)
    assert sum("the prepared data are damaged" in line for line in run.lines) == 2


def test_a_damaged_stored_tokenizer_is_loaded_again(model, tmp_path, tokenizer):
    _, folder = open_tokenizer(str(model), tmp_path)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for broken in (content[: len(content) // 2], b""):
            path.write_bytes(broken)
            again, same = open_tokenizer(str(model), tmp_path)
            assert same == folder and again.fingerprint == tokenizer.fingerprint
            assert path.read_bytes() == content
    assert [entry.name for entry in (tmp_path / "tokenizers").iterdir()] == [folder.name]


def test_a_warm_start_needs_no_transformers(run, assets, tmp_path):
    model = assets / "models" / "stories260k"  # has a tokenizer.json, which transformers loads
    rows = write(tmp_path / "rows.jsonl", pairs(10))
    cold = run(rows, model_path=model, max_length=200)
    code = f"""
import sys
from sft_jax.config import parse_config
from sft_jax.data.prepare import prepare
data = {{"train": {rows!r}, "cache_dir": {str(run.cache)!r}, "max_length": 200, "chat_template": "none"}}
config = parse_config({{"model": {{"path": "m"}}, "data": data}}).data
found = prepare(config, model_path={str(model)!r}, log=lambda line: None)
print(found.fingerprints["plan"], [name for name in ("transformers", "jax") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    warm = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert warm.stdout.split() == [cold.fingerprints["plan"], "[]"]


# ---- streams


def test_the_length_of_the_stream(run, tmp_path, no_workers):
    rows = write(tmp_path / "rows.jsonl", pairs(40))
    epoch = run(rows).train.total_rows
    no_workers()
    assert epoch > 2
    lines = [line for _, line, _ in documents_by_line(run(rows).train)]
    assert sorted(lines) == list(range(1, 41))  # an epoch is every row of the file once, and nothing else
    twice = run(rows, options={"epochs": 2.0}).train
    batch = twice.read(0, twice.total_rows)
    places = [twice.identity(number)[2] for row in range(twice.total_rows) for number, _, _ in documents_of(batch, row)]
    assert Counter(places) == Counter(range(1, 41)) + Counter(range(1, 41))
    assert (batch.segments.max(axis=-1) > 0).all()  # no row is empty
    assert run(rows, options={"epochs": 0.5}).train.total_rows == -(-epoch // 2)
    assert run(rows, options={"epochs": 1e-10}).train.total_rows == 1
    assert run(rows, options={"rows": 123, "epochs": 0.5}).train.total_rows == 123


def test_mixture_and_eval_sets(run, tmp_path):
    few, many = write(tmp_path / "few.jsonl", pairs(10)), write(tmp_path / "many.jsonl", pairs(30, seed=1))
    train = {"few": {"path": few, "weight": 3}, "many": {"path": many, "weight": 1}}
    data = run(train, eval={"first": many, "second": few}, packing=False)
    assert documents_of_sets(data.train) == {"few": 30, "many": 10}
    assert list(data.eval) == ["first", "second"]
    lines = [data.eval["first"].identity(int(e))[2] for e in data.eval["first"].read(0, 30).examples[:, 0]]
    assert lines == list(range(1, 31))  # held-out rows come once, in the order of the file
    stream = data.report["train"]["stream"]["sets"]
    assert {name: (part["documents"], part["epochs"]) for name, part in stream.items()} == {"few": (30, 3.0), "many": (10, 10 / 30)}
    assert sum(part["supervised_tokens"] for part in stream.values()) == data.train.supervised_tokens


def test_a_set_comes_up_as_often_as_its_epochs_say(run, tmp_path):
    """Counted in the rows that are trained on, over several epochs of the run."""
    files = {name: write(tmp_path / f"{name}.jsonl", pairs(count, seed=count)) for name, count in (("a", 5), ("b", 8), ("c", 7))}
    train = {"a": {"path": files["a"], "epochs": 3}, "b": {"path": files["b"], "epochs": 0.5}, "c": files["c"]}
    for passes in (1, 2, 4):
        data = run(train, options={"epochs": float(passes)})
        batch = data.train.read(0, data.train.total_rows)
        seen = Counter(
            data.train.identity(number)[::2] for row in range(data.train.total_rows) for number, _, _ in documents_of(batch, row)
        )
        assert {key: n for key, n in seen.items() if key[0] == "a"} == {("a", line): 3 * passes for line in range(1, 6)}
        assert {key: n for key, n in seen.items() if key[0] == "c"} == {("c", line): passes for line in range(1, 8)}
        assert sum(n for key, n in seen.items() if key[0] == "b") == 4 * passes
        if passes > 1:
            assert {key: n for key, n in seen.items() if key[0] == "b"} == {("b", line): passes // 2 for line in range(1, 9)}
        assert data.train.epochs_of_sets() == {"a": 3.0 * passes, "b": 0.5 * passes, "c": 1.0 * passes}
    plain = run({name: path for name, path in files.items()})
    once = run({name: {"path": path, "epochs": 1.0} for name, path in files.items()})
    assert plain.fingerprints == once.fingerprints != data.fingerprints  # the same rows are the same plan


def test_epochs_that_give_less_than_a_document_are_refused(run, tmp_path):
    train = {"a": {"path": write(tmp_path / "a.jsonl", pairs(5)), "epochs": 0.19}}
    with pytest.raises(UserError) as caught:
        run(train)
    assert str(caught.value) == "data.train.a.epochs: 0.19 of its 5 documents is less than one in an epoch; raise it to 1/5 or more."
    train["a"]["epochs"] = 0.2
    assert documents_of_sets(run(train).train) == {"a": 1}


def lines_of(stream) -> set[int]:
    numbers = np.unique(stream.read(0, stream.total_rows).examples)
    return {stream.identity(number)[2] for number in numbers[numbers >= 0]}


def test_a_cap_takes_a_sample_of_the_rows(run, tmp_path, no_workers):
    """It is the same in every epoch, for held-out rows whatever the seed, and a larger one holds a smaller one."""
    rows = write(tmp_path / "rows.jsonl", pairs(60))
    whole = run(rows, eval=rows)
    no_workers()
    small, same, large = (run({"s": {"path": rows, "cap": cap}}, options={"epochs": 3.0}) for cap in (20, 20, 40))
    other = run({"s": {"path": rows, "cap": 20}}, options={"seed": 1})
    assert small.fingerprints == same.fingerprints != large.fingerprints
    assert len(lines_of(small.train)) == 20 and documents_of_sets(small.train) == {"s": 60}
    assert lines_of(small.train) < lines_of(large.train) < lines_of(whole.train)
    assert lines_of(other.train) != lines_of(small.train) and len(lines_of(other.train)) == 20
    assert lines_of(small.train) != set(range(1, 21))
    report = small.report["train"]["sets"]["s"]
    assert (report["rows_beyond_cap"], report["documents"], report["rows_used"]) == (40, 20, 60)
    assert run({"s": {"path": rows, "cap": 60}}).report["train"]["sets"]["s"]["rows_beyond_cap"] == 0
    held_out = [run(rows, eval={"e": {"path": rows, "cap": 7}}, options={"seed": seed}).eval["e"] for seed in (0, 1)]
    assert lines_of(held_out[0]) == lines_of(held_out[1]) and len(lines_of(held_out[0])) == 7


def test_a_cap_has_no_bias(run, tmp_path):
    """Over many seeds every row is taken equally often, by the chi-squared statistic of 59 degrees of freedom."""
    rows = write(tmp_path / "rows.jsonl", pairs(60))
    taken = Counter(line for seed in range(150) for line in lines_of(run({"s": {"path": rows, "cap": 6}}, options={"seed": seed}).train))
    expected = 150 * 6 / 60
    statistic = sum((taken[line] - expected) ** 2 / expected for line in range(1, 61)) / (1 - 6 / 60)
    assert 30 < statistic < 100


def test_a_cap_counts_rows_and_not_the_documents_that_they_become(run, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "completion": " fox" * (60 if i % 2 else 5)} for i in range(12)])
    options = {"max_length": 32, "overlength": "split"}
    data = run({"s": {"path": rows, "cap": 6}}, **options)
    whole = run(rows, **options)
    assert len(lines_of(data.train)) == 6
    documents = Counter(whole.train.identity(whole.train.document(i)[0])[2] for i in range(whole.train.document_count))
    assert data.train.examples == sum(documents[line] for line in lines_of(data.train)) > 6
    dropped = run({"s": {"path": rows, "cap": 6}}, max_length=32, overlength="drop")
    assert lines_of(dropped.train) == {1, 3, 5, 7, 9, 11}  # all of those that can be trained on


def test_a_weight_can_be_a_share_of_supervised_tokens(run, tmp_path):
    """Counted in the rows that are trained on: half of the supervised tokens are the long set's, not of the documents."""
    short = [{"prompt": f"p{i}", "completion": " fox"} for i in range(90)]
    long = [{"prompt": f"p{i}", "completion": " fox" * 30} for i in range(30)]
    train = {
        "short": {"path": write(tmp_path / "short.jsonl", short), "weight": 1},
        "long": {"path": write(tmp_path / "long.jsonl", long), "weight": 1},
    }

    def supervised(data) -> dict[str, int]:
        batch = data.train.read(0, data.train.total_rows)
        found = {"short": 0, "long": 0}
        for row in range(data.train.total_rows):
            for number, _, weights in documents_of(batch, row):
                found[data.train.identity(number)[0]] += sum(weight > 0 for weight in weights)
        return found

    by_documents = run(train)
    assert documents_of_sets(by_documents.train) == {"short": 60, "long": 60}
    by_tokens = run(train, weight_by="supervised_tokens")
    shares = supervised(by_tokens)
    assert abs(shares["long"] / sum(shares.values()) - 0.5) < 0.02
    assert supervised(by_documents)["long"] > 5 * supervised(by_documents)["short"]
    whole = sum(supervised(run({name: part["path"] for name, part in train.items()})).values())
    assert abs(sum(shares.values()) / whole - 1) < 0.02  # an epoch is as many supervised tokens as there are
    assert by_tokens.fingerprints["plan"] != by_documents.fingerprints["plan"]


def test_the_smallest_weights_are_still_numbers_when_every_example_counts_the_same(run, tmp_path):
    rows = [{"messages": [turn("user", "q"), turn("assistant", "a", weight=weight)]} for weight in (1e-6, 1e6, 1)]
    data = run(write(tmp_path / "rows.jsonl", rows), chat_template="chatml", options={"normalize": "examples"})
    sums = [sum(weights) for _, weights in documents_by_line(data.train).values()]
    assert len(sums) == 3 and np.allclose(sums, 1, atol=1e-6)


def test_every_example_counts_the_same_in_training_only(run, tmp_path):
    rows = write(tmp_path / "rows.jsonl", pairs(10))
    data = run(rows, eval=rows, options={"normalize": "examples"})
    sums = [sum(weights) for _, weights in documents_by_line(data.train).values()]
    assert np.allclose(sums, 1, atol=1e-6)
    assert {w for _, weights in documents_by_line(data.eval["eval"]).values() for w in weights} == {0.0, 1.0}


# ---- the report


def test_the_report_counts_everything(run, tmp_path, tokenizer):
    rows = pairs(20) + [
        {"prompt": "long", "completion": " fox" * 200},
        {"prompt": "p", "completion": 5},
        "{broken\n",
        {"prompt": "p"},
    ]
    data = run(write(tmp_path / "rows.jsonl", rows), bad_rows="skip", overlength="truncate_right")
    report = data.report["train"]["sets"]["train"]
    assert json.loads(json.dumps(data.report)) == data.report
    assert (report["rows_read"], report["rows_used"], report["examples"], report["documents"]) == (24, 21, 21, 21)
    left_out = report["rows_left_out"]
    assert left_out["total"] == 3 and sum(group["rows"] for group in left_out["reasons"]) == 3
    assert sorted(place for group in left_out["reasons"] for place in group["first"]) == [
        f"{tmp_path}/rows.jsonl:{line}" for line in (22, 23, 24)
    ]
    assert report["over_length"]["cut"] == 1 and report["over_length"]["supervised_tokens_lost"] > 0
    lengths = [
        len(tokenizer.plain_prefix) + len(tokenizer.encode(row["prompt"] + row["completion"])) + 1 for row in rows[:21]
    ]
    assert report["tokens"] == sum(lengths) - 21
    assert report["used_tokens"] == sum(min(n, 129) for n in lengths) - 21
    assert report["length_percentiles"]["0"] == min(lengths) and report["length_percentiles"]["100"] == max(lengths)
    assert (
        report["supervised_tokens"] - report["used_supervised_tokens"]
        == report["over_length"]["supervised_tokens_lost"]
    )
    stream = data.report["train"]["stream"]
    batch = data.train.read(0, data.train.total_rows)
    assert stream["packing_efficiency"] == (batch.segments > 0).sum() / batch.segments.size
    assert stream["supervised_tokens"] == (batch.weights > 0).sum() == report["used_supervised_tokens"]


def test_fields_that_nothing_reads_are_counted(run, tmp_path):
    rows = chats(100)
    for row in rows[:70]:
        row["messages"][0]["name"] = "Bob"
        row["source"] = "web"
    rows[3]["id"] = 1
    rows += [{"messages": 5, "id": 2}]  # a row that is left out is counted there
    options = {"chat_template": "chatml", "bad_rows": "skip", "format": "messages", "workers": 2}
    report = run(write(tmp_path / "rows.jsonl", rows), **options).report["train"]["sets"]["train"]
    assert report["unused_fields"] == {"messages[].name": 70, "source": 70, "id": 1}
    assert report["more_unused_fields"] == 0
    rows = [{**row, f"key {number}": 1} for number, row in enumerate(chats(150))]
    report = run(write(tmp_path / "keys.jsonl", rows), **options).report["train"]["sets"]["train"]
    assert len(report["unused_fields"]) == 100 and report["more_unused_fields"] == 50


def test_bad_rows_of_one_reason_are_one_entry(run, tmp_path):
    rows = pairs(5) + [{"prompt": f"p{i}", "completion": i} for i in range(7)] + ["{\n"]
    report = run(write(tmp_path / "rows.jsonl", rows), bad_rows="skip").report["train"]["sets"]["train"][
        "rows_left_out"
    ]
    assert [group["rows"] for group in report["reasons"]] == [7, 1]
    assert report["reasons"][0]["first"] == [f"{tmp_path}/rows.jsonl:{line}" for line in (6, 7, 8)]


# ---- bad input


def fails(run, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        run(*args, **kwargs)
    assert not list(run.cache.glob("tokens/*/manifest*"))  # nothing is left that could be taken for prepared data
    assert not list(run.cache.glob("tokens/*/*.tmp.*"))
    return str(caught.value)


def test_bad_rows_stop_the_run_and_are_named_and_counted(run, tmp_path):
    rows = pairs(100)
    for line in (7, 71, 72, 90, 91, 95):
        rows[line - 1] = {"prompt": "p", "completion": line}
    message = fails(run, write(tmp_path / "rows.jsonl", rows), format="prompt_completion")
    assert "data.train: 6 of 100 rows cannot be used" in message
    for line in (7, 71, 72, 90, 91):
        assert f"\n  {tmp_path}/rows.jsonl:{line}: " in message
    assert "rows.jsonl:95" not in message and "and 1 more" in message
    assert "data.bad_rows=skip" in message


def test_reading_stops_some_way_behind_the_first_bad_row(run, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "LOOK_AHEAD", 150)
    rows = pairs(1000)
    rows[9] = "{\n"
    message = fails(run, write(tmp_path / "rows.jsonl", rows), format="prompt_completion")
    assert f"{tmp_path}/rows.jsonl:10: " in message and "1 of the " in message and " rows read so far cannot be used" in message and "1,000" not in message


def test_skipped_bad_rows_stop_a_later_run_that_does_not_skip(run, tmp_path, no_workers):
    rows = write(tmp_path / "rows.jsonl", [*pairs(5), {"prompt": "p", "completion": 1}])
    assert run(rows, bad_rows="skip", format="prompt_completion").train.examples == 5
    no_workers()
    with pytest.raises(UserError, match=r"1 of 6 rows cannot be used:\n.*rows\.jsonl:6: "):
        run(rows, format="prompt_completion")


def test_nothing_supervised_names_rows(run, tmp_path):
    unsupervised = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    ] * 3
    message = fails(run, write(tmp_path / "rows.jsonl", unsupervised), chat_template="chatml", bad_rows="skip")
    assert "data.train: none of its 3 rows can be used" in message
    assert f"{tmp_path}/rows.jsonl:1: " in message and "supervised" in message


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
EAT = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


def chat_template(path: Path, body: str) -> str:
    path.write_text(
        "{% for m in messages %}<{{ m.role }}>{% if 'BOOM' in m.content %}"
        + body
        + "{% endif %}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return str(path)


@pytest.fixture
def wild(tmp_path):
    """Options and data of which the fifth row makes the template do `body`."""

    def make(body):
        rows = chats(12)
        rows[4]["messages"][0]["content"] = "BOOM"
        template = chat_template(tmp_path / "template.jinja", body)
        return write(tmp_path / "rows.jsonl", rows), {
            "chat_template": template,
            "row_timeout": 1.0,
            "row_memory_mb": 64,
        }

    return make


def test_a_row_on_which_the_template_loops_for_ever_is_named(run, tmp_path, wild):
    rows, options = wild(LOOP)
    message = fails(run, rows, **options)
    assert f"{tmp_path}/rows.jsonl:5: " in message and "took longer than 1 seconds; see data.row_timeout" in message


def test_a_row_on_which_the_template_eats_memory_is_named_and_can_be_skipped(run, tmp_path, wild):
    rows, options = wild(EAT)
    data = run(rows, bad_rows="skip", **{**options, "row_timeout": 20.0})
    assert data.train.examples == 11
    (group,) = data.report["train"]["sets"]["train"]["rows_left_out"]["reasons"]
    assert group["first"] == [f"{tmp_path}/rows.jsonl:5"]
    assert "needed more than 64 MB of memory; see data.row_memory_mb" in group["reason"]


@pytest.mark.parametrize("body, limit, reason", [
    (LOOP, {"row_timeout": 1.0, "row_memory_mb": 512}, "took longer than 1 seconds; see data.row_timeout"),
    (EAT, {"row_timeout": 60.0, "row_memory_mb": 64}, "needed more than 64 MB of memory; see data.row_memory_mb"),
])  # fmt: skip
def test_a_template_that_runs_wild_when_it_is_asked_how_it_shows_calls_is_named(run, tmp_path, body, limit, reason):
    """The first row with a call makes the template render calls that are in no row."""
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}" + body + "{{ m.tool_calls }}{% endif %}{{ m.content }}</s>{% endfor %}"
    )
    rows = chats(12)
    rows[4]["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": {"key": "value"}}}]
    data = run(write(tmp_path / "rows.jsonl", rows), chat_template=str(template), bad_rows="skip", **limit)
    assert data.train.examples == 11
    (group,) = data.report["train"]["sets"]["train"]["rows_left_out"]["reasons"]
    assert group["first"] == [f"{tmp_path}/rows.jsonl:5"] and reason in group["reason"]


@pytest.mark.parametrize("body, limit, reason", [
    ("{% for i in range(10**9) %}{% endfor %}", {"row_timeout": 1.0, "row_memory_mb": 512}, "Range too big"),
    (LOOP, {"row_timeout": 1.0, "row_memory_mb": 512}, "took longer than 1 seconds; see data.row_timeout"),
    ("{{ ('ab' * 999999999) | length }}", {"row_timeout": 60.0, "row_memory_mb": 64}, "needed more than 64 MB of memory; see data.row_memory_mb"),
])  # fmt: skip
def test_an_expression_of_columns_that_runs_wild_is_named(run, tmp_path, body, limit, reason):
    rows = pairs(12)
    rows[4]["prompt"] = "BOOM"
    columns = {"prompt": "{% if prompt == 'BOOM' %}" + body + "{% endif %}{{ prompt }}"}
    data = run(write(tmp_path / "rows.jsonl", rows), columns=columns, format="prompt_completion", bad_rows="skip", **limit)
    assert data.train.examples == 11
    (group,) = data.report["train"]["sets"]["train"]["rows_left_out"]["reasons"]
    assert group["first"] == [f"{tmp_path}/rows.jsonl:5"] and reason in group["reason"]


def test_an_expression_of_columns_that_runs_wild_when_compiled_is_named(run, tmp_path):
    """jinja2 evaluates constants when it compiles, which the workers do, too."""
    columns = {"prompt": "{{ 9**(9**9) }}{{ prompt }}"}
    message = fails(run, write(tmp_path / "rows.jsonl", pairs(3)), columns=columns, format="prompt_completion", row_timeout=1.0)
    assert "took longer than 1 seconds; see data.row_timeout" in message and "rows.jsonl:1" in message


def test_a_template_that_always_runs_wild_is_not_tried_on_every_row(run, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "WATCHDOG_ROWS", 2)
    rows = [
        {"messages": [{"role": "user", "content": "BOOM"}, {"role": "assistant", "content": str(i)}]} for i in range(50)
    ]
    template = chat_template(tmp_path / "template.jinja", LOOP)
    message = fails(run, write(tmp_path / "rows.jsonl", rows), chat_template=template, bad_rows="skip", row_timeout=0.3)
    assert "2 of the 2 rows read so far ran into the limits of data.row_timeout" in message and "rows.jsonl:1" in message


def test_a_template_that_runs_wild_when_compiled_is_named(run, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ 9**(9**9) }}")  # jinja2 evaluates constant expressions when it compiles
    message = fails(run, write(tmp_path / "rows.jsonl", chats(3)), chat_template=str(template), row_timeout=1.0)
    assert f"{template}: preparing for it took longer than 1 seconds" in message


def test_a_template_that_is_not_valid_is_named(run, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for %}")
    message = fails(run, write(tmp_path / "rows.jsonl", chats(3)), chat_template=str(template))
    assert str(template) in message and "not a valid chat template" in message


def test_over_length_rows_are_named_and_every_policy_says_when_nothing_is_left(run, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": " fox" * 200}] * 2)
    with pytest.raises(
        UserError, match=r"2 example\(s\) do not fit data\.max_length 128: .*rows\.jsonl:1 \(\d+ tokens\)"
    ):
        run(rows)
    with pytest.raises(UserError, match=r"data\.train: nothing is left of it, .*data\.overlength is 'drop'"):
        run(rows, overlength="drop")


def test_a_cache_that_cannot_be_written_is_one_message(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        run(write(tmp_path / "rows.jsonl", pairs(3)), cache_dir=str(tmp_path / "file" / "cache"))


def test_a_wrong_path_is_told_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_cache, "load_tokenizer", None)
    rows = write(tmp_path / "rows.jsonl", pairs(3))
    with pytest.raises(UserError, match=r"data\.eval\.held: .*nothing\.jsonl"):
        run(rows, eval={"held": str(tmp_path / "nothing.jsonl")})


def test_the_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "sft_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "sft_jax"
