"""The page of a report in a browser: no errors, nothing of the content runs, everything is there; curves are where the log says."""

import json
import re
import subprocess

import numpy as np
import pytest
from planted_runs import edit_lines, planted

from sft_jax.diagnosis.diagnose import examine
from sft_jax.diagnosis.page import write_page
from sft_jax.inspection.series import line_plot

HOSTILE = "</td></script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">\x1b[1m"


@pytest.mark.browser
def test_the_page_has_no_errors_and_runs_nothing_of_its_content(healthy, tmp_path, chromium):
    run = planted(healthy, tmp_path / "run")
    edit_lines(run / "samples.jsonl", lambda sample: sample.update(generation=HOSTILE, finished=False))
    path = tmp_path / "page.html"
    assert str(path) in write_page(path, examine(run))
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert "<title>Report: " in done.stdout and "\x1b" not in done.stdout and "<img" not in done.stdout
    for anchor in ("causes", "losses", "learning", "time", "data", "answers", "scores", "ledger", "notes"):
        assert f'<section id="{anchor}"' in done.stdout, anchor
    assert "1. truncated_answers" in done.stdout and "http" not in re.sub(r"http-equiv", "", done.stdout)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = re.search(r'class="curve line0" points="([^"]+)"', done.stdout)[1].split()
    assert len(points) == sum(record["split"] == "train" for record in steps)


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
