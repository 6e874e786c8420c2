"""Tools that check launch files, in a virtual environment of their own, since some of them bring much along: `make launch-tools`."""

import glob
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_run import ROOT

_TOOLS = ROOT / ".venv-launch"


def tool(name: str) -> str:
    """Returns the path of a program, or skips the test."""
    found = shutil.which(name, path=str(_TOOLS / "bin")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; make launch-tools")
    return found


def libtpu() -> str:
    """Returns the path of libtpu.so, or skips the test."""
    found = glob.glob(str(_TOOLS / "lib/python3*/site-packages/libtpu/libtpu.so"))
    if not found:
        pytest.skip("libtpu is not installed; make launch-tools")
    return found[0]


def validate(program: str, value) -> str | None:
    """Runs Python that validates the JSON value `value`, with the packages of the tools; returns its last line of error, or None."""
    python = _TOOLS / "bin/python"
    if not Path(python).exists():
        pytest.skip("the tools that check launch files are not installed; make launch-tools")
    result = subprocess.run([str(python), "-c", f"import json, sys\nvalue = json.load(sys.stdin)\n{program}"], input=json.dumps(value), capture_output=True, text=True)
    assert "ModuleNotFoundError" not in result.stderr, result.stderr
    return (result.stderr.strip().splitlines() or ["failed"])[-1] if result.returncode else None
