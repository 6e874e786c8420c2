"""Shared fixtures. Eight CPU devices are made before jax is imported, so that every layout can be tested."""

import os
import shutil
import sys
import time
from pathlib import Path

from xla_flags import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--cluster", action="store_true", help="also run the tests marked cluster")
    parser.addoption("--minutes", type=float, help="skip tests marked slow that would begin later than so many minutes from the start")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pytest_report_header():
    return f"browser: {CHROMIUM or 'none, so tests marked browser are deselected; install chromium to run them'}"


def pytest_collection_modifyitems(config, items):
    left_out = {name for name in ("slow", "cluster") if not config.getoption(f"--{name}")}
    if CHROMIUM is None:
        left_out.add("browser")
    platforms = os.environ["JAX_PLATFORMS"].split(",")
    stays = [
        not left_out & item.keywords.keys() and all(mark.args[0] in platforms for mark in item.iter_markers("device")) for item in items
    ]
    config.hook.pytest_deselected(items=[item for item, stay in zip(items, stays, strict=True) if not stay])
    items[:] = [item for item, stay in zip(items, stays, strict=True) if stay]


_NO_TIME = "no time is left for it (--minutes)"
_BEGUN = float(os.environ.setdefault("SFT_JAX_TESTS_BEGUN", str(time.time())))  # processes of pytest-xdist find it set


def pytest_runtest_setup(item):
    minutes = item.config.getoption("--minutes")
    if minutes is not None and "slow" in item.keywords and time.time() > _BEGUN + 60 * minutes:
        pytest.skip(_NO_TIME)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_a_module():
    """Compiles each program of a module once, and lets them go at its end: they are gigabytes over the whole suite."""
    if "jax" not in sys.modules:
        yield
        return
    from compiled_once import compiled_once

    with compiled_once():
        yield
    sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser, for tests marked browser."""
    return CHROMIUM


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models, tokenizers, templates and data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SFT_JAX_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no assets at {folder}; set SFT_JAX_ASSETS to run this test")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With SFT_JAX_FORBID_SKIPS=1 (continuous integration) a skipped test fails: there nothing may be missing."""
    report = yield
    forbidden = os.environ.get("SFT_JAX_FORBID_SKIPS") == "1" and not hasattr(report, "wasxfail")
    if report.skipped and forbidden and _NO_TIME not in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped, and SFT_JAX_FORBID_SKIPS is set: {report.longrepr}"
    return report
