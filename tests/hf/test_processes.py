"""Two processes read a model in halves, and write it together as one would."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tiny_models import CONFIGS, random_decoder, to_tensors
from xla_flags import xla_flags

from sft_jax.hf.files import SINGLE_FILE, open_tensors
from sft_jax.hf.load import load_decoder
from sft_jax.model.options import Options
from sft_jax.model.sharding import named_leaves

WORKER = Path(__file__).with_name("process_worker.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    decoder = random_decoder("gemma2")
    tensors = to_tensors(decoder, decoder, CONFIGS["gemma2"])
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / SINGLE_FILE)
    (folder / "config.json").write_text(json.dumps(CONFIGS["gemma2"]))
    return folder


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]

    def run(index: int):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags()}
        command = [sys.executable, str(WORKER), str(model), str(out), str(port), "2", str(index)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(run, range(2)))
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr[-3000:] + runs[1].stderr[-3000:]
    return out, [json.loads(run.stdout.splitlines()[-1]) for run in runs]


@pytest.mark.slow
def test_each_process_reads_its_half(model, results):
    total = sum(info.nbytes for info in open_tensors(model).tensors.values())
    read = [result["read"] for result in results[1]]
    assert sum(read) <= total * 1.001 + 8 * 64 * 64  # what eight devices do not divide is read by all
    assert max(read) < 0.51 * total


def test_both_hold_the_model(results):
    expected = {path: float(np.abs(leaf.get_value()).sum()) for path, leaf in named_leaves(random_decoder("gemma2"))}
    for result in results[1]:
        assert result["sums"].keys() == expected.keys()
        for path, value in expected.items():
            np.testing.assert_allclose(result["sums"][path], value, rtol=1e-5)


def test_both_know_what_they_read(model, results):
    expected = load_decoder(model, Options()).source.fingerprint
    assert [result["fingerprint"] for result in results[1]] == [expected, expected]


@pytest.mark.parametrize("name", ["exported", "after"])
def test_what_they_write_is_the_model(name, model, results):
    written, original = open_tensors(results[0] / name), open_tensors(model)
    assert written.tensors.keys() == original.tensors.keys()
    for tensor in original.tensors:
        assert written.read(tensor).tobytes() == original.read(tensor).tobytes()
    assert all(result["logit_difference"] < 1e-5 for result in results[1])


def test_new_tokens_are_those_of_one_process(model, results):
    name = "model.embed_tokens.weight"
    before, after = open_tensors(model).read(name), open_tensors(results[0] / "larger").read(name)
    mean = before.astype(np.float64).mean(axis=0).astype(np.float32)
    np.testing.assert_array_equal(after, np.concatenate([before, [mean] * 3]))
    assert json.loads((results[0] / "larger/config.json").read_text())["vocab_size"] == 99
    assert all(result["larger_difference"] < 1e-5 for result in results[1])


def test_a_model_that_one_process_cannot_see_ends_all(results):
    first, second = results[1]
    assert first["absent"].startswith("UserError: Process 1 failed")
    assert second["absent"].startswith("UserError") and "there is no such directory" in second["absent"]


def test_a_failure_of_the_first_process_ends_all(results):
    first, second = results[1]
    assert first["taken"].startswith("UserError") and "is there already" in first["taken"]
    assert first["full"].startswith("UserError") and "the disk is full" in first["full"]
    assert second["taken"].startswith("UserError: Process 0") and second["full"].startswith("RuntimeError: Process 0")
    assert first["after"] == second["after"] == "saved"
    assert {path.name for path in results[0].iterdir()} == {"exported", "larger", "after"}
