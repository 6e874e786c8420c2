"""Templates and expressions that run wild while rows are prepared: they are stopped, and the row is named."""

from pathlib import Path

import pytest
from preparing import chats, fails, model, pairs, run, write  # fixtures too

from sft_jax.data.stores import build
from sft_jax.errors import UserError

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


@pytest.mark.slow
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
