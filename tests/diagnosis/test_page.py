"""The page of a report in a browser: no errors, nothing of the content runs, everything is there; curves are where the log says."""

import dataclasses
import json
import re
import subprocess

import numpy as np
import pytest
from planted_runs import edit_json, edit_lines, planted

from sft_jax.diagnosis.compare import compare, write_comparison
from sft_jax.diagnosis.diagnose import examine
from sft_jax.diagnosis.finding import Divergence, Measured, TextLoss
from sft_jax.diagnosis.health import health_of
from sft_jax.diagnosis.page import write_page
from sft_jax.inspection.markup import escape
from sft_jax.inspection.series import line_plot

HOSTILE = "</td></script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">\x1b[1m"


@pytest.mark.browser
def test_the_page_has_no_errors_and_runs_nothing_of_its_content(healthy, tmp_path, chromium):
    run = planted(healthy, tmp_path / "run")
    edit_lines(run / "samples.jsonl", lambda sample: sample.update(generation=HOSTILE, finished=False))
    path = tmp_path / "page.html"
    assert str(path) in write_page(path, examine(run))
    shown = opened(path, chromium, tmp_path)
    assert "<title>Report: " in shown and "\x1b" not in shown and "<img" not in shown
    for anchor in ("causes", "losses", "learning", "time", "data", "answers", "scores", "ledger", "notes"):
        assert f'<section id="{anchor}"' in shown, anchor
    assert "1. truncated_answers" in shown
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = re.search(r'class="curve line0" points="([^"]+)"', shown)[1].split()
    assert len(points) == sum(record["split"] == "train" for record in steps)


def opened(path, chromium, tmp_path) -> str:
    """The page as the browser has it after loading, which it has done without an error and without the network."""
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert "http" not in re.sub(r"http-equiv", "", done.stdout)
    return done.stdout


def section(shown: str, anchor: str) -> str:
    return shown[shown.index(f'<section id="{anchor}"') :].partition("</section>")[0]


@pytest.mark.browser
def test_the_page_shows_the_models_the_rates_the_time_and_each_answer_beside_the_one_before(healthy, tmp_path, chromium):
    run = planted(healthy, tmp_path / "run")
    numbers: dict[tuple, int] = {}

    def name_answers(sample):
        place = numbers.setdefault(tuple(sample["example"].values()), len(numbers))
        when = "before" if sample["step"] == 0 else "after"
        sample.update(generation=f"{when} {place}<", prompt=f"prompt {place}.", exact_match=0.25)

    edit_lines(run / "samples.jsonl", name_answers)
    edit_json(run / "summary.json", lambda summary: summary.update(seconds={"train": 90.4, "evaluate": 32.6, "export": 0.0}, mfu=0.417))
    report = examine(run)
    measured = Measured(
        general=TextLoss(2.0, 2.05, (0.01, 0.09), 7, 500), own_samples=TextLoss(0.5, 0.9, (0.3, 0.5), 16, 768),
        from_base=Divergence(1.2345, 0.02, 431), export=Divergence(2.5e-4, 1e-5, 431),
    )  # fmt: skip
    report = dataclasses.replace(report, evidence=dataclasses.replace(report.evidence, measured=measured))
    path = tmp_path / "page.html"
    write_page(path, report)
    shown = opened(path, chromium, tmp_path)

    models = re.sub(r"<[^>]+>", " ", section(shown, "models"))
    assert "KL of the trained model from its base on neutral prompts: 1.23 \u00b1 0.02 nats a token (431 tokens)." in models
    assert "KL of the export from the checkpoint on neutral prompts: 0.00025" in models
    assert "Loss of general text: 2.000 before, 2.050 after, +0.050 [+0.010, +0.090]" in models and "what the base writes: 0.500 before" in models

    rows = re.findall(r"<tr>(.*?)</tr>", section(shown, "answers"))
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    sides = {row[2]: row[4:7] for row in cells if len(row) == 7}
    assert len(numbers) == 12 == len(sides)
    assert sides == {f"prompt {place}.": [f"before {place}&lt;", f"after {place}&lt;", "exact_match 0.25"] for place in numbers.values()}

    rates = [record["learning_rate"] for record in map(json.loads, (run / "metrics.jsonl").open()) if record["split"] == "train"]
    learning = section(shown, "learning")
    assert "Learning rate" in learning and "Norm of an update" in learning
    points = re.search(r'points="([^"]+)"', learning)[1].split()
    down = [float(point.split(",")[1]) for point in points]
    assert len(points) == len(rates) and np.corrcoef(rates, down)[0, 1] < -0.9999 and max(rates) > 10 * min(rates)

    time = section(shown, "time")
    assert "Where 123 s went" in time and "41.7%" in time
    widths = [float(width) for width in re.findall(r'<rect class="bar bar0"[^>]* width="([0-9.]+)"', time)]
    assert len(widths) == 2 and widths[0] / widths[1] == pytest.approx(90 / 33, rel=0.03)


def test_a_run_that_answered_nothing_has_a_page_with_the_answers_that_were_made_for_it(healthy, tmp_path):
    run = planted(healthy, tmp_path / "run")
    made = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    made = tuple(sample for sample in made if sample["step"])  # once to each prompt, as measure makes them
    (run / "samples.jsonl").unlink()
    report = examine(run, quick=True, measure=None)
    write_page(tmp_path / "before.html", report)
    assert "has answered no prompts" in section((tmp_path / "before.html").read_text(), "answers")
    evidence = dataclasses.replace(report.evidence, answers=made, health=health_of(made))
    write_page(tmp_path / "page.html", dataclasses.replace(report, evidence=evidence))
    shown = section((tmp_path / "page.html").read_text(), "answers")
    assert "Side by side" in shown and shown.count(escape(made[0]["prompt"])) == 1
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", shown)]
    assert [row[4] for row in rows if len(row) == 7] == [""] * len(made)  # there is no first answer


@pytest.mark.browser
def test_a_page_of_two_runs_has_no_errors_and_both_of_each(healthy, tmp_path, chromium):
    other = planted(healthy, tmp_path / "other")
    edit_json(other / "config.json", lambda config: config["optim"].update(learning_rate=0.5))
    edit_lines(other / "samples.jsonl", lambda sample: sample.update(exact_match=1.0, generation=HOSTILE))
    edit_lines(other / "metrics.jsonl", lambda record: record.update(loss=9.0) if record["split"] != "train" else None)
    path = tmp_path / "page.html"
    write_comparison(path, compare(examine(healthy, quick=True), examine(other, quick=True)))
    shown = opened(path, chromium, tmp_path)
    for anchor in ("curves", "differences", "causes0", "causes1"):
        assert f'<section id="{anchor}"' in shown, anchor
    assert "Causes: healthy" in shown and "Causes: other" in shown and "<img" not in shown and "\x1b" not in shown
    assert re.search(r"<td[^>]*>optim.learning_rate</td><td[^>]*>0.002</td><td[^>]*>0.5</td>", section(shown, "differences"))
    assert "9.0000" in section(shown, "differences") and "1. first_loss" in section(shown, "causes1")
    first, second = (re.findall(rf'class="curve line{number}" points="([^"]+)"', section(shown, "curves"))[0] for number in (0, 1))
    assert len(first.split()) > 5 and len(second.split()) >= 2


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_curve_is_drawn_to_scale(logarithmic):
    x, y = np.array([0.0, 50.0, 100.0]), np.array([10.0, 1.0, 0.1])
    plot = line_plot([("loss", x, y)], "a < b", "step", "nats", logarithmic=logarithmic)
    (points,) = re.findall(r'points="([^"]+)"', plot)
    across, down = np.array([[float(part) for part in point.split(",")] for point in points.split()]).T
    np.testing.assert_allclose((across[1] - across[0]) / (across[2] - across[0]), 0.5, atol=1e-3)
    np.testing.assert_allclose((down[1] - down[0]) / (down[2] - down[0]), 0.5 if logarithmic else 9 / 9.9, atol=1e-3)
    assert "a &lt; b" in plot and down[0] < down[2]


def test_what_has_no_place_on_a_logarithmic_axis_is_left_out():
    plot = line_plot([("rate", np.arange(3.0), np.array([0.0, 1.0, np.nan]))], "rate", "step", "rate", logarithmic=True)
    assert len(re.findall(r'points="([^"]+)"', plot)[0].split()) == 1
