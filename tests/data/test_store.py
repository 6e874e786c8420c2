"""A store gives back what was written, and a damaged one is noticed and named."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic_data import Plain, examples, make_corpus, make_store, random_examples

from sft_jax.data.stores import store_writer
from sft_jax.data.stores.store import FIELDS, Mapped, StoreDamaged, encode, open_shard, open_store, weight_runs
from sft_jax.data.stores.store_writer import ShardWriter, find_shard, remove_manifest, remove_shard, write_manifest
from sft_jax.errors import UserError

quick = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=1, max_size=5)))
def test_weight_runs_expand_to_the_weights(examples):
    weights = np.array([w for example in examples for w in example], np.float32)
    counts, lengths, values = weight_runs(weights, np.array([len(example) for example in examples], np.int64))
    assert len(counts) == len(examples) and (lengths > 0).all()
    at = 0
    for example, count in zip(examples, counts.tolist(), strict=True):
        own = slice(at, at + count)
        assert np.repeat(values[own], lengths[own]).tolist() == example
        assert (np.diff(values[own]) != 0).all()
        at += count
    assert at == len(lengths) == len(values)


@given(st.lists(st.lists(examples(min_tokens=1), min_size=1, max_size=8), min_size=1, max_size=3))
@quick
def test_tokens_weights_and_identities_come_back(sets):
    corpus = make_corpus(*sets)
    number = 0
    for name, plain in enumerate(sets):
        for line, example in enumerate(plain, start=1):
            start, stop = corpus.offsets[number : number + 1], corpus.offsets[number + 1 : number + 2]
            assert corpus.read_ids(start, stop).tolist() == example.ids
            assert corpus.read_weights(start, stop).tolist() == example.weights
            assert corpus.identity(number) == (f"set_{name}", "rows.jsonl", line, -1)
            number += 1
    assert len(corpus) == number
    with pytest.raises(IndexError):
        corpus.identity(number)
    with pytest.raises(IndexError):
        corpus.identity(-1)


@given(st.lists(examples(min_tokens=1), min_size=1, max_size=6), st.data())
@quick
def test_ranges_and_running_totals(plain, data):
    corpus = make_corpus(plain)
    weights = [w for example in plain for w in example.weights]
    ids = [i for example in plain for i in example.ids]
    places = np.arange(len(ids) + 1)
    assert corpus.supervised_before(places).tolist() == [sum(w > 0 for w in weights[:p]) for p in places]
    assert corpus.weight_before(places).tolist() == [sum(weights[:p]) for p in places]
    ranges = []
    for _ in range(data.draw(st.integers(0, 4))):
        example = data.draw(st.integers(0, len(plain) - 1))
        start = data.draw(st.integers(corpus.offsets[example], corpus.offsets[example + 1] - 1))
        ranges.append((start, data.draw(st.integers(start + 1, corpus.offsets[example + 1]))))
    starts, stops = (np.array([r[i] for r in ranges], np.int64) for i in (0, 1))
    assert corpus.read_ids(starts, stops).tolist() == [i for a, b in ranges for i in ids[a:b]]
    assert corpus.read_weights(starts, stops).tolist() == [w for a, b in ranges for w in weights[a:b]]


def test_turns_come_back(tmp_path):
    plain = [
        Plain([1, 2, 3], [0, 0, 1], 2, (0, 2), (2, 3)),
        Plain([4, 5], [0, 1]),
        Plain([6, 7], [0, 1], 0, (1,), (1,)),
    ]
    corpus = make_corpus(plain, plain[:1])
    assert [tuple(part.tolist() for part in corpus.turns(e)) for e in range(4)] == [
        ([0, 2], [2, 3]), ([], []), ([1], [1]), ([0, 2], [2, 3]),
    ]  # fmt: skip
    assert [corpus.identity(e)[3] for e in range(4)] == [2, -1, 0, 2]


def finish(writer, counted=None):
    """Writes an example of two tokens as a shard."""
    writer.append(encode([(0, [1, 2], [0, 1], -1, [], [])]), np.zeros(1), np.ones(1))
    return writer.finish(counted or {}, [])


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=5), st.data())
def test_a_mapped_field_is_its_parts_end_to_end(parts, data):
    mapped, plain = Mapped([np.array(part, np.int64) for part in parts]), [value for part in parts for value in part]
    assert mapped.whole().tolist() == plain and [mapped[index] for index in range(len(plain))] == plain
    base = 0
    for part in parts:
        first = data.draw(st.integers(0, len(part)))
        last = data.draw(st.integers(first, len(part)))
        if first < last:
            assert mapped.part(base + first, base + last).tolist() == part[first:last]
        else:
            assert mapped.part(base + first, base + first).tolist() == []
        base += len(part)


def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path):
    for vocabulary, size in ((65536, 2), (65537, 4)):
        folder = tmp_path / str(vocabulary)
        with ShardWriter(folder, 0, (0, 1), vocabulary) as writer:
            writer.append(encode([(0, [0, vocabulary - 1], [0, 1], -1, [], [])]), np.zeros(1), np.ones(1))
            write_manifest(folder, "", [writer.finish({}, [])], ["f"], {})
        store = open_store(folder)
        assert store.ids[0].dtype.itemsize == size and store.ids[0].tolist() == [0, vocabulary - 1]


@pytest.mark.parametrize("bad", [[0, 1000], [-1, 0]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="outside the vocabulary"), ShardWriter(tmp_path / "s", 0, (0, 1), 1000) as writer:
        writer.append(encode([(0, bad, [0, 1], -1, [], [])]), np.zeros(1), np.ones(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(tmp_path, weight):
    with pytest.raises(ValueError, match="weight"), ShardWriter(tmp_path / "s", 0, (0, 1), 1000) as writer:
        writer.append(encode([(0, [1, 2], [0, weight], -1, [], [])]), np.zeros(1), np.ones(1))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "store"
    store = make_store(random_examples(10), folder, shard_tokens=100)
    assert len(store.ids) > 1
    return folder


def test_every_file_is_checked(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) > 2 * len(FIELDS)
    for path in files:
        whole = path.read_bytes()
        changed = [b"x" + whole, None]
        if whole:
            changed += [whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])]
        for content in changed:
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
            if content is None and path.name == "manifest.json":
                assert open_store(folder) is None
            else:
                with pytest.raises(StoreDamaged, match=path.name):
                    open_store(folder)
        path.write_bytes(whole)
    assert open_store(folder) is not None


def test_a_changed_manifest_is_noticed(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["meta"]["rows"] = 9
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreDamaged, match="was changed"):
        open_store(folder)


def test_a_removed_manifest_leaves_the_shards(folder):
    shards = names_in(folder)[:-1]
    remove_manifest(folder)
    assert open_store(folder) is None and names_in(folder) == shards
    remove_manifest(folder)  # of nothing: no error
    remove_shard(folder / shards[0])
    remove_shard(folder / shards[0])
    assert names_in(folder) == shards[1:]


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "store", 0, (0, 1), 1000) as writer:
        writer.append(encode([(0, [1, 2], [0, 1], -1, [], [])]), np.zeros(1), np.ones(1))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_is_no_store_and_its_remains_are_removed(tmp_path):
    code = f"""
import numpy as np, os, signal
from pathlib import Path
from sft_jax.data.stores.store import encode
from sft_jax.data.stores.store_writer import ShardWriter
writer = ShardWriter(Path({str(tmp_path)!r}), 0, (0, 1), 1000).__enter__()
writer.append(encode([(0, [1, 2], [0, 1], -1, [], [])]), np.zeros(1), np.ones(1))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert open_store(tmp_path) is None and open_shard(tmp_path / "00000") is None
    assert len(list(tmp_path.iterdir())) == 1
    make_store(random_examples(3, max_tokens=10), tmp_path)
    assert names_in(tmp_path) == ["00000", "manifest.json"]


def test_a_folder_that_another_process_takes_away_is_made_again(tmp_path, monkeypatch):
    """One that fails removes the folder of the store if it is empty, perhaps just before another writes to it."""
    real, left = store_writer._locked_folder, [1]

    def late(path):
        if left:
            left.pop()
            path.parent.rmdir()
        return real(path)

    monkeypatch.setattr(store_writer, "_locked_folder", late)
    with store_writer.ShardWriter(tmp_path / "store", 0, (0, 1), 100) as writer:
        assert writer.temporary.is_dir() and not left


def test_the_faster_of_two_builds_wins(tmp_path):
    with ShardWriter(tmp_path, 0, (0, 1), 1000) as slow:
        with ShardWriter(tmp_path, 0, (0, 1), 1000) as fast:
            finish(fast, {"by": 1})
        assert finish(slow, {"by": 2}).record["counted"] == {"by": 1}
    assert names_in(tmp_path) == ["00000"]
    assert open_shard(tmp_path / "00000").record["counted"] == {"by": 1}


def test_a_build_in_progress_is_left_alone_whatever_the_number_of_its_process(tmp_path):
    """Another container has the same host name and may have the same process number; only the lock tells."""
    code = f"""
import sys
from pathlib import Path
from sft_jax.data.stores.store_writer import ShardWriter
with ShardWriter(Path({str(tmp_path)!r}), 0, (0, 1), 1000) as writer:
    print(writer.temporary, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        temporary = Path(other.stdout.readline().strip())
        with ShardWriter(tmp_path, 0, (0, 1), 1000):
            assert temporary.is_dir()
        other.kill()
        other.wait()
        with ShardWriter(tmp_path, 1, (1, 2), 1000):
            assert temporary.is_dir()  # of another shard, which may be another host's
        with ShardWriter(tmp_path, 0, (0, 1), 1000):
            assert not temporary.exists()


def test_what_is_left_of_a_shard_without_a_record_makes_room(folder):
    content = names_in(folder)
    remove_manifest(folder)
    (folder / "00001" / "shard.json").unlink()  # a removal, or a copy, that was cut short
    assert open_shard(folder / "00001") is None
    assert len(make_store(random_examples(10), folder, shard_tokens=100)) == 10
    assert names_in(folder) == content and [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_shard_is_found_under_any_of_its_names_unless_it_is_damaged(folder):
    lines = []
    (folder / "00001").rename(folder / "00001-2026-01-31")
    rows = tuple(open_shard(folder / "00001-2026-01-31").record["rows"])
    assert find_shard(folder, 1, [""], rows, lines.append) is None
    assert find_shard(folder, 1, ["-2026-01-31", ""], rows, lines.append).folder.name == "00001-2026-01-31"
    assert lines == [] and find_shard(folder, 99, [""], rows, lines.append) is None
    ids = folder / "00001-2026-01-31" / "ids"
    ids.write_bytes(ids.read_bytes()[:-1])
    assert find_shard(folder, 1, ["-2026-01-31"], rows, lines.append) is None and not ids.parent.exists()
    assert len(lines) == 1 and str(ids) in lines[0]
    first = tuple(open_shard(folder / "00000").record["rows"])
    assert find_shard(folder, 0, [""], (0, first[1] + 1), lines.append) is None  # it would leave rows out
    assert f"is not of the rows 0 to {first[1] + 1}" in lines[1]


def test_the_content_of_a_store_is_what_rows_are_made_of(tmp_path):
    plain = random_examples(5)
    base = make_store(plain, tmp_path / "base").content
    assert make_store(plain, tmp_path / "same").content == base
    changed = {"ids": plain[1].ids[:-1] + [plain[1].ids[-1] ^ 1], "weights": [0.0] * (len(plain[1].ids) - 1) + [0.5]}
    for change in ({"ids": changed["ids"]}, {"weights": changed["weights"]}, {"turn_starts": (0,), "turn_roles": (2,)}):
        other = [plain[0], plain[1]._replace(**change), *plain[2:]]
        assert make_store(other, tmp_path / f"other_{next(iter(change))}").content != base
    # Where examples are from is no part of it.
    assert make_store([plain[0]._replace(turn=3), *plain[1:]], tmp_path / "elsewhere").content == base


def test_a_full_disk_is_one_message_that_names_the_key(tmp_path, monkeypatch):
    from sft_jax.data.stores import store_writer

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_writer._HashedFile, "write", full)
    with pytest.raises(UserError, match=r"store: .*No space left on device.*data\.cache_dir"):
        make_store(random_examples(3), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        make_store(random_examples(3), tmp_path / "file" / "store")
