"""Large pages: asked for on a CPU, never against what the user set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft_jax import large_pages

PROGRAM = """
import sys
from sft_jax.large_pages import use_large_pages
use_large_pages()
block = bytearray(64 << 20)
block[:: 4096] = bytes(len(block) // 4096)
large = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
print(sys.argv[1], int(large.split()[1]))
"""


def large_kib(**variables) -> int:
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"} | variables
    result = subprocess.run([sys.executable, "-c", PROGRAM, "an argument"], env=environment, capture_output=True, text=True, check=True)
    argument, kib = result.stdout.rsplit(" ", 1)
    assert argument == "an argument"
    return int(kib)


def test_a_command_on_a_cpu_has_large_pages_where_they_are_given_on_request():
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    given = mode.is_file() and "[never]" not in mode.read_text()
    assert (large_kib(JAX_PLATFORMS="cpu") > 32 << 10) == given


def test_what_the_user_set_stays():
    if large_pages._on_request():
        assert large_kib(JAX_PLATFORMS="cpu", GLIBC_TUNABLES="glibc.malloc.check=0") < 32 << 10


@pytest.mark.parametrize(("platforms", "devices", "on_cpu"), [("cpu", ["/dev/nvidia0"], True), ("", ["/dev/nvidia0"], False), ("", [], True), ("cuda", [], False)])
def test_only_a_cpu_asks(platforms, devices, on_cpu, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(large_pages.glob, "glob", lambda pattern: [d for d in devices if pattern.startswith("/dev/nvidia")])
    assert large_pages._on_cpu() == on_cpu
