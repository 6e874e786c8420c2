"""Broken rows and broken files become examples, or errors that say why: the properties of scripts/fuzz_data.py, for seconds."""

import argparse
import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz_data
import fuzz_files
import fuzz_properties
import fuzz_rows
import fuzz_workers
import numpy as np
import pytest
from chat_cases import shared_tokenizer
from format_rows import any_row, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_jax.data.chats.chat import RowBuilder
from sft_jax.data.chats.templates import TEMPLATES, ChatTemplate
from sft_jax.data.examples import RowError, in_message
from sft_jax.data.formats.registry import FORMATS

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def ways(assets):
    """Builders for one tokenizer: without a template, ChatML, and one that shows calls and drops earlier thinking."""
    qwen = shared_tokenizer(assets / "tokenizers" / "qwen3")
    sources = {"plain": None, "chatml": TEMPLATES["chatml"], "qwen3": (assets / "chat_templates/stock/Qwen-Qwen3-0.6B.jinja").read_text()}
    return [
        fuzz_properties.Builder(name, RowBuilder(qwen, source and ChatTemplate(source, qwen.special_tokens)), qwen)
        for name, source in sources.items()
    ]


@QUICK
@given(st.integers(0, 2**32), st.sampled_from(fuzz_rows.COLUMNS))
def test_changed_rows_become_examples_or_errors(ways, seed, columns):
    choose = random.Random(seed)
    rows = [fuzz_rows.mutate(choose.choice(fuzz_rows.SHAPES), choose) for _ in range(12)]
    outcomes = fuzz_properties.try_rows(rows, choose.choice(ways), columns)
    assert outcomes.total() >= len(rows)


@QUICK
@given(st.lists(any_row, min_size=1, max_size=8))
def test_any_rows_become_examples_or_errors(ways, rows):
    for way in ways:
        fuzz_properties.try_rows(rows, way, fuzz_rows.COLUMNS[0])


def test_rows_that_nothing_changed_all_become_examples(ways):
    """So what is tried does get as far as examples."""
    found: Counter[str] = Counter()
    for row in fuzz_rows.SHAPES:
        found.update(fuzz_properties.try_rows([row], ways[2], fuzz_rows.COLUMNS[0]))
    assert found["built once"] + found["built per_turn"] + found["built plain"] == len(fuzz_rows.SHAPES)


@pytest.mark.parametrize("kind", fuzz_files.KINDS)
def test_broken_files_are_read_or_refused(tmp_path, kind):
    rows, outcomes = fuzz_properties.try_file(fuzz_files.write(kind, fuzz_rows.SHAPES, tmp_path, None))
    assert len(rows) == len(fuzz_rows.SHAPES) == outcomes["rows of files"]
    for seed in range(25):
        fuzz_properties.try_file(fuzz_files.write(kind, fuzz_rows.SHAPES, tmp_path, random.Random(seed)))


@pytest.fixture
def fuzz(ways, assets, tmp_path, monkeypatch):
    """The loop of scripts/fuzz_data.py with few rows, templates and kinds of rows."""
    monkeypatch.setattr(fuzz_data, "builders", lambda assets: ways)
    monkeypatch.setattr(fuzz_data, "seed_rows", lambda assets: fuzz_rows.SHAPES)
    settings = {"rows": 300, "seconds": 0, "seed": 11, "batch": 8, "row_seconds": 5.0, "growth_mb": 60, "failures": tmp_path / "found"}
    return lambda **more: fuzz_data.fuzz(argparse.Namespace(assets=assets, **{**settings, **more}))


def test_the_loop_finds_nothing_in_what_is_right(fuzz, tmp_path):
    """It tries rows, files and worker processes."""
    summary = fuzz()
    assert summary["found"] == {} and summary["rows"] >= 300 and not (tmp_path / "found").exists()
    assert {"examples", "rows of files"} < set(summary["outcomes"]) and any(name.startswith("workers: ") for name in summary["outcomes"])


def test_the_loop_reports_what_is_planted(fuzz, monkeypatch, tmp_path):
    """Memory that grows with every few rows, however short the run, and rows that raise or do not end; each once, with its row."""
    kept, turns = [], itertools.count()

    def planted(rows, builder, columns):
        kept.append(b"x" * (8 << 20))
        if any("prompt" in row for row in rows) and len(rows) == 1:
            raise ZeroDivisionError("planted")
        if len(rows) > 1 and next(turns) % 4 == 0:
            raise ValueError("of some row")
        return Counter()

    monkeypatch.setattr(fuzz_data, "try_rows", planted)
    monkeypatch.setattr(fuzz_data, "try_workers", lambda *arguments: Counter())
    found = fuzz()["found"]
    assert any(re.fullmatch(r"memory grew by \d+ MB over the second half", kind) for kind in found)
    assert any(kind.startswith("ZeroDivisionError at ") for kind in found) and len(found) == 2
    (data,) = (pickle.loads(path.read_bytes()) for path in (tmp_path / "found").glob("*.pickle"))
    assert "prompt" in data["row"]


def test_a_process_that_grows_at_first_only_is_no_leak():
    memory = fuzz_data.Memory()
    memory.samples = [100, 300, 500, 640, 655, 660, 661, 659, 660, 662, 661, 660]
    assert memory.grown() <= 0
    memory.samples = [100 + 10 * number for number in range(20)]
    assert memory.grown() == 70
    memory.samples = [100, 900, 900]
    assert memory.grown() == 0


def test_samples_of_memory_lie_evenly_over_the_rows():
    memory, taken = fuzz_data.Memory(), []
    for rows in range(0, 4000, 8):
        before = len(memory.samples)
        memory.look(rows)
        taken += [rows] * (len(memory.samples) != before)
    assert 32 <= len(memory.samples) < 64 and set(np.diff(taken[-15:]).tolist()) == {64}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_hostile_templates_are_stopped_in_workers(assets, tmp_path, seed):
    choose = random.Random(seed)
    rows = [fuzz_rows.mutate(choose.choice(fuzz_rows.SHAPES), choose) for _ in range(8)]
    assert sum(fuzz_workers.try_workers(rows, assets / "models/stories260k", tmp_path / "rows", choose).values()) > 0


@pytest.mark.slow
def test_the_guided_loop_runs_to_its_end(assets, tmp_path):
    pytest.importorskip("atheris")
    script = Path(fuzz_data.__file__).with_name("fuzz_guided.py")
    command = [sys.executable, str(script), "--assets", str(assets), "--seconds", "5", "--failures", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    summary = json.loads(done.stdout)
    assert (done.returncode, summary["found"]) == (0, {}) and summary["inputs"] > 0, done.stderr[-2000:]


@pytest.mark.parametrize("change", ["weights", "ids", "guard", "message"])
def test_what_may_not_come_out_is_noticed(ways, change):
    way, row = ways[1], fuzz_rows.SHAPES[0]
    (built,) = way.rows.build([read("messages", row)])
    example = built.examples[0]
    if change == "message":
        with pytest.raises(AssertionError, match="cannot be printed"):
            fuzz_properties.check_message("field '\ud800'")
    elif change == "guard":
        told = read("messages", {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "b"}]})
        open_rows = RowBuilder(way.tokenizer, ChatTemplate(TEMPLATES["chatml"], way.tokenizer.special_tokens), allow_special_tokens=True)
        (leaking,) = open_rows.build([told])
        fuzz_properties.check_guard(way.rows.build([told])[0], told, way)
        with pytest.raises(AssertionError, match="control tokens where there should be"):
            fuzz_properties.check_guard(leaking._replace(counts={"guarded": 1}), told, way)
    else:
        changed = {"weights": {"weights": -example.weights}, "ids": {"ids": example.ids + way.tokenizer.vocab_size}}[change]
        fuzz_properties.check_row(built, way.tokenizer)
        with pytest.raises(AssertionError):
            fuzz_properties.check_row(built._replace(examples=(example._replace(**changed),)), way.tokenizer)


# --- what fuzzing found ---


@pytest.mark.parametrize(
    "row, message",
    [
        ({"tools": [{"name": "f", "x": b"\xff"}]}, "'tools[0]' holds bytes that are no text in UTF-8, which JSON cannot hold; correct the row."),
        (
            {"calls": [{"name": "f", "arguments": {"x": [b"\xff"]}}]},
            "'messages[1].tool_calls[0]' holds bytes that are no text in UTF-8, which JSON cannot hold; correct the row.",
        ),
    ],
)
def test_what_json_cannot_hold_is_no_tool_and_no_argument(row, message):
    """Parquet files may hold it; it went as far as json.dumps."""
    answer = {"role": "assistant", "content": "b", "tool_calls": row.pop("calls", None)}
    with pytest.raises(RowError) as error:
        read("messages", {"messages": [{"role": "user", "content": "a"}, answer], **row})
    assert str(error.value) == message


def test_names_of_fields_with_half_of_a_surrogate_pair_can_be_printed():
    row = {"messages": [{"role": "user", "\ud800": 1}]}
    with pytest.raises(RowError) as error:
        read("messages", row)
    assert str(error.value) == r"messages[0]: 'content' is missing; the turn has: role, \ud800; correct the row."
    assert FORMATS["messages"].unread_fields({**row, "\udfff": 1}, fuzz_rows.COLUMNS[0]) == {r"\udfff", r"messages[].\ud800"}
    assert FORMATS["text"].misfit({"\ud800": 1}, fuzz_rows.COLUMNS[0]) == (
        r"field 'text' is missing (data.columns.text); the row has: \ud800"
    )


@pytest.mark.parametrize("name", ["text", "self", "kwargs", "message"])
def test_template_arguments_of_a_row_may_have_any_name(ways, name):
    """Those of Python's own parameters, too."""
    row = {**fuzz_rows.SHAPES[2], "chat_template_kwargs": {name: "x"}}
    (built,) = ways[1].rows.build([read("messages", row)])
    (plain,) = ways[1].rows.build([read("messages", fuzz_rows.SHAPES[2] | {"chat_template_kwargs": None})])
    assert built.examples[0].text == plain.examples[0].text


@pytest.mark.filterwarnings("error")
def test_weights_beyond_float32_are_refused_without_a_warning():
    with pytest.raises(RowError) as error:
        read("tokens", {"input_ids": [5, 6, 7], "weights": [0, 0.5, 1e300]})
    assert str(error.value) == "'weights' must be 0, or from 1e-06 to 1e+06, not inf; correct the row."


def test_what_is_said_of_a_row_is_not_as_long_as_the_row():
    with pytest.raises(RowError) as error:
        read("messages", {"messages": [{"role": "u" * 10**6, "content": "a"}]})
    assert len(str(error.value)) < 5000 and str(error.value).startswith("messages[0]: unknown role 'uuu")
    assert str(error.value).endswith("Known: assistant, developer, system, tool, user.")
    assert in_message("a" * 4000) == "a" * 4000
