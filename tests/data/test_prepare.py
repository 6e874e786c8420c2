"""Preparing: from files of rows to streams, against the parts called one by one; the report, and bad input."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from preparing import chats, fails, model, no_workers, pairs, run, tokenizer, turn, write  # fixtures too
from row_kinds import KINDS
from synthetic_data import documents_of

from sft_jax.data.cache import default_cache
from sft_jax.data.chats.chat import build_rows
from sft_jax.data.chats.templates import resolve_template
from sft_jax.data.formats.conversation import Conversation, Message
from sft_jax.data.stores import build, tokenizer_cache
from sft_jax.errors import UserError


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
