"""Building a store in pieces: killed and started again, or by several processes, it is the same store."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from sft_jax.config_parsing import parse_config
from sft_jax.data.prepare import prepare, prepare_part
from sft_jax.data.stores import store
from sft_jax.data.stores.build import Part
from sft_jax.errors import UserError

MODEL = Path(__file__).parents[2] / "models" / "nano"
SHARD_ROWS = 40


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", SHARD_ROWS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """230 rows in 6 shards; two of them cannot be used, and one field is read by nothing."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"prompt": f"Question {i}:", "completion": f" {i * i}.", **({"source": i} if i % 3 else {})} for i in range(230)]
    lines[55] = lines[221] = {"prompt": "no completion", "completion": 5}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(rows: Path, cache: Path, **more):
    data = {"train": str(rows), "cache_dir": str(cache), "max_length": 64, "workers": 1, "chat_template": "none", "bad_rows": "skip"}
    return parse_config({"model": {"path": "m"}, "data": {**data, **more}}).data


def run(rows: Path, cache: Path, log=lambda line: None, **more):
    return prepare(config_of(rows, cache, **more), model_path=str(MODEL), log=log)


def run_part(rows: Path, cache: Path, index: int, count: int, log=lambda line: None, **more) -> bool:
    return prepare_part(config_of(rows, cache, **more), model_path=str(MODEL), part=Part(index, count), log=log)


def content(cache: Path) -> dict[str, bytes]:
    folder = cache / "tokens"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(rows):
    """What a build leaves that nothing interrupted, with its data."""
    with mock.patch.object(store, "SHARD_ROWS", SHARD_ROWS):
        data = run(rows, rows.parent / "whole")
    files = content(rows.parent / "whole")
    assert len({name.split("/")[1] for name in files}) == 7  # six shards and a manifest
    return data, files


KILLED = """
import os, signal, sys
from pathlib import Path
from sft_jax.data.stores import store
from sft_jax.data.stores import store_writer
from test_build import SHARD_ROWS, run

store.SHARD_ROWS = SHARD_ROWS
owner, name, calls, after = sys.argv[3], sys.argv[4], int(sys.argv[5]), sys.argv[6] == "after"
owner = getattr(store_writer, owner) if owner else store_writer
function = getattr(owner, name)

def killed(*args, **kwargs):
    global calls
    calls -= 1
    if not calls and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    result = function(*args, **kwargs)
    if not calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, killed)
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    "owner, name, calls, when, finished",
    [
        pytest.param("ShardWriter", "append", 1, "before", 0, marks=pytest.mark.slow),
        ("ShardWriter", "append", 13, "after", 3),  # there are four chunks in a shard
        pytest.param("", "_write_record", 3, "after", 2, marks=pytest.mark.slow),
        pytest.param("", "_move", 5, "before", 4, marks=pytest.mark.slow),
        pytest.param("", "_move", 5, "after", 5, marks=pytest.mark.slow),
        ("", "_write_record", 7, "after", 6),  # of the manifest, before it is in place
        pytest.param("", "_sync_folder", 7, "after", 6, marks=pytest.mark.slow),  # the manifest is in place
    ],
)
def test_a_build_that_was_killed_goes_on_from_whole_shards(rows, whole, tmp_path, owner, name, calls, when, finished):
    cache = tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    arguments = [str(rows), str(cache), owner, name, str(calls), when]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*/shard.json") if ".tmp." not in str(path)}
    assert len(times) == finished
    lines = []
    data = run(rows, cache, lines.append)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # nothing was made twice
    left = {name: value for name, value in content(cache).items() if not name.endswith("/lock")}  # of a manifest just made
    assert left == whole[1]
    assert data.fingerprints == whole[0].fingerprints and data.report == whole[0].report
    going_on = [line for line in lines if "going on" in line]
    if name != "_sync_folder":
        done = sum(min(SHARD_ROWS, 230 - SHARD_ROWS * number) for number in range(finished))
        expected = f"data.train: {done:,} of 230 rows were prepared before; going on from there."
        assert going_on == ([expected] if finished else [])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_of_several_processes_are_the_same_store(rows, whole, tmp_path, order):
    """Whichever ends last completes it, and says so; before that there is none."""
    cache, lines = tmp_path / "cache", []
    for place, index in enumerate(order):
        assert run_part(rows, cache, index, 3, lines.append) is (place == 2)
        assert len(list(cache.glob("tokens/*/[0-9]*"))) == 2 * (place + 1)
        assert bool(list(cache.glob("tokens/*/manifest.json"))) is (place == 2)
    assert content(cache) == whole[1]
    (folder,) = (cache / "tokens").iterdir()
    waiting = [line for line in lines if "missing" in line]
    assert waiting == [
        f"data.train: part {index} of 3 is prepared; {missing} of 6 shards are still missing in {folder}. Whichever part ends "
        "last completes it."
        for index, missing in zip(order, (4, 2), strict=False)
    ]
    assert run(rows, cache).fingerprints == whole[0].fingerprints


@pytest.mark.slow
def test_parts_at_the_same_time_are_the_same_store(rows, whole, tmp_path):
    """Also where two processes by mistake have the same part."""
    code = """
import sys
from pathlib import Path
from sft_jax.data.stores import store
from test_build import SHARD_ROWS, run_part

store.SHARD_ROWS = SHARD_ROWS
run_part(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), 2, print)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    cache = tmp_path / "cache"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rows), str(cache), str(index)], env=environment) for index in (0, 1, 1)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert content(cache) == whole[1]


def test_a_run_makes_what_a_part_has_left(rows, whole, tmp_path):
    cache = tmp_path / "cache"
    assert not run_part(rows, cache, 1, 2)
    assert run(rows, cache).fingerprints == whole[0].fingerprints and content(cache) == whole[1]


def test_a_part_with_bad_rows_names_them(rows, tmp_path):
    """Of the shards that are its own, and of those that others have made."""
    places = r"cannot be used:\n.*rows\.jsonl:56: .*\n.*rows\.jsonl:222: "
    with pytest.raises(UserError, match=r"^data\.train: 2 of the 110 rows read so far " + places):
        run_part(rows, tmp_path / "cache", 1, 2, bad_rows="error")
    with pytest.raises(UserError, match=r"^data\.train: 2 of 230 rows " + places):
        run_part(rows, tmp_path / "cache", 0, 2, bad_rows="error")
    assert not list(tmp_path.glob("cache/tokens/*/manifest*"))


def test_one_damaged_shard_is_made_again_and_no_other(rows, whole, tmp_path):
    shutil.copytree(rows.parent / "whole", tmp_path / "whole")
    ids = next((tmp_path / "whole" / "tokens").glob("*/00003/ids"))
    others = {path: path.stat().st_mtime_ns for path in ids.parents[1].glob("*/shard.json") if path.parent != ids.parent}
    ids.write_bytes(ids.read_bytes()[:-1])
    lines = []
    run(rows, tmp_path / "whole", lines.append)
    assert content(tmp_path / "whole") == whole[1] and all(path.stat().st_mtime_ns == time for path, time in others.items())
    assert [line for line in lines if "made again" in line] == [
        f"A part of the prepared data is damaged and is made again: {ids} has {len(whole[1][ids.relative_to(ids.parents[2]).as_posix()]) - 1} "
        f"bytes instead of {ids.stat().st_size}."
    ]


DATED = (
    "{% for m in messages %}{% if 'today' in m.content %}{{ strftime_now('%d %B %Y') }}{% endif %}<{{ m.role }}>{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_shards_that_do_not_depend_on_the_day_are_kept_on_another(tmp_path):
    """A build that is killed on one day and goes on on the next has no row of the day before."""
    (tmp_path / "template.jinja").write_text(DATED)
    lines = [[{"role": "user", "content": f"q{i}{' today' * (i >= 2 * SHARD_ROWS)}"}, {"role": "assistant", "content": "a"}] for i in range(100)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))

    def on(day: str, cache: str):
        config = config_of(rows, tmp_path / cache, chat_template=str(tmp_path / "template.jinja"))
        return prepare(config, model_path=str(MODEL), rendered_at=day, log=lambda line: None)

    first = on("2026-01-30", "cache")
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "00002-2026-01-30", "manifest-2026-01-30.json"]
    (folder / "manifest-2026-01-30.json").unlink()  # as if the build had been killed just before its end
    second, fresh = on("2026-01-31", "cache"), on("2026-01-31", "fresh")
    assert second.fingerprints == fresh.fingerprints and second.fingerprints["plan"] != first.fingerprints["plan"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000", "00001", "00002-2026-01-30", "00002-2026-01-31", "manifest-2026-01-31.json",
    ]  # fmt: skip
    assert "31 January 2026" in second.tokenizer.decode(second.train.document(99)[1].tolist())
    assert on("2026-01-30", "cache").fingerprints == first.fingerprints


def test_parts_that_write_the_date_need_one(tmp_path):
    """Two hosts that begin before and after midnight would prepare different rows."""
    (tmp_path / "template.jinja").write_text(DATED)
    lines = [[{"role": "user", "content": f"q{i}{' today' * (i == 70)}"}, {"role": "assistant", "content": "a"}] for i in range(100)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    options = {"chat_template": str(tmp_path / "template.jinja")}
    assert run_part(rows, tmp_path / "cache", 0, 2, **options) is False  # shards 0 and 2 hold no date
    with pytest.raises(UserError, match="data.date: the chat template writes the date into rows of data.train, .*; set data.date, such as "):
        run_part(rows, tmp_path / "cache", 1, 2, **options)
    assert run_part(rows, tmp_path / "cache", 1, 2, **options, date="2026-01-30")
    assert run_part(rows, tmp_path / "alone", 0, 1, **options)
