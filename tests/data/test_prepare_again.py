"""Preparing again: what is used again, what is made again, and what is damaged."""

import os
import subprocess
import sys

import pytest
from preparing import chats, fails, first_text, model, no_workers, pairs, run, tokenizer, turn, write  # fixtures too
from sentencepiece import sentencepiece_model_pb2

from sft_jax.data.stores import maker as stores
from sft_jax.data.stores import tokenizer_cache
from sft_jax.data.stores.tokenizer_cache import open_tokenizer
from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.errors import UserError


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


DATED = (
    "{{ strftime_now('%d %B %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


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


def test_only_the_data_set_that_writes_the_date_depends_on_it(run, tmp_path):
    """Whatever other set the same worker has prepared before."""
    template = tmp_path / "template.jinja"
    template.write_text(DATED.replace("{{ strftime_now('%d %B %Y') }}", "{% if 'DATE' in messages[0].content %}{{ strftime_now('%d %B %Y') }}{% endif %}"))
    dated = [{"messages": [turn("user", "DATE?"), turn("assistant", "Yes.")]}]
    sets = {"dated": write(tmp_path / "a.jsonl", dated), "plain": write(tmp_path / "b.jsonl", chats(4))}
    first = run(sets, chat_template=str(template), options={"rendered_at": "2026-01-30"})
    second = run(sets, chat_template=str(template), options={"rendered_at": "2026-01-31"})
    assert first.stores["data.train.dated"] == second.stores["data.train.dated"]
    names = [[store.name for store in data.train.corpus.stores] for data in (first, second)]
    assert names[0][0] != names[1][0] and names[0][1] == names[1][1]


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
    from sft_jax.data.stores import fingerprint

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


def test_the_tokenizer_that_a_faster_process_has_stored_stays(model, tmp_path, monkeypatch):
    """Its workers may be reading it."""
    def load(*arguments):
        monkeypatch.undo()
        _, folder = open_tokenizer(str(model), tmp_path)  # the faster one
        seen.append((folder.stat().st_ino, folder))
        return load_tokenizer(*arguments)

    seen = []
    monkeypatch.setattr(tokenizer_cache, "load_tokenizer", load)
    _, folder = open_tokenizer(str(model), tmp_path)
    assert seen == [(folder.stat().st_ino, folder)]


def test_a_warm_start_needs_no_transformers(run, assets, tmp_path):
    model = assets / "models" / "stories260k"  # has a tokenizer.json, which transformers loads
    rows = write(tmp_path / "rows.jsonl", pairs(10))
    cold = run(rows, model_path=model, max_length=200)
    code = f"""
import sys
from sft_jax.config_parsing import parse_config
from sft_jax.data.prepare import prepare
data = {{"train": {rows!r}, "cache_dir": {str(run.cache)!r}, "max_length": 200, "chat_template": "none"}}
config = parse_config({{"model": {{"path": "m"}}, "data": data}}).data
found = prepare(config, model_path={str(model)!r}, log=lambda line: None)
print(found.fingerprints["plan"], [name for name in ("transformers", "jax") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    warm = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert warm.stdout.split() == [cold.fingerprints["plan"], "[]"]
