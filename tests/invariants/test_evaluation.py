"""What evaluation says does not depend on batch size, packing, devices or processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from evaluation_sets import PROMPTS, decoder_on, evaluate_on, everything_on, held_out, held_out_stream
from several_processes import finish, start_commands
from slow_values import slow
from tiny_run import ROOT, environment, make_base, tiny_config
from xla_flags import xla_flags

from sft_jax.evaluation.generate import generate_ids
from sft_jax.evaluation.sampling import sampling
from sft_jax.model.sharding import make_mesh

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def expected():
    """The values of the set, document by document, from logits in float64."""
    read = jax.jit(lambda decoder, tokens: decoder(tokens))
    total = weight = correct = tokens = 0.0
    for example in held_out():
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(example.ids)] = example.ids
        logits = np.asarray(read(decoder_on(None), padded))[0].astype(np.float64)
        for place in range(1, len(example.ids)):
            row, target = logits[place - 1], example.ids[place]
            nll = np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
            total += example.weights[place] * nll
            weight += example.weights[place]
            correct += example.weights[place] * (row.argmax() == target)
            tokens += example.weights[place] > 0
    values = {"loss": total / weight, "perplexity": np.exp(total / weight), "accuracy": correct / weight}
    return {**values, "tokens": tokens, "examples": len(held_out())}


def test_loss_is_that_of_every_document_alone(expected):
    assert evaluate_on(None) == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["accuracy"] < 1


def test_batch_size_packing_and_devices_do_not_matter():
    assert held_out_stream().total_rows % 3 and held_out_stream().total_rows % 8  # the last batch is padded
    assert held_out_stream(packing=False).total_rows > 1.5 * held_out_stream().total_rows
    reference = evaluate_on(None)
    for mesh, batch_size, packing in (
        (None, 1, True), (None, 3, True), (None, 4, False), (make_mesh(2, 2, 2), 3, True),
    ):  # fmt: skip
        assert evaluate_on(mesh, batch_size, packing) == pytest.approx(reference, rel=1e-6), (mesh, batch_size, packing)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("mistral", dict(fsdp=2, context=2, tensor=2)), *slow(("gpt_oss", dict(data=2, fsdp=1, expert=2, context=2)))],
)
def test_answers_do_not_depend_on_the_devices(name, sizes):
    alone = generate_ids(decoder_on(None, name), PROMPTS, (3,), 20)
    decoder = decoder_on(make_mesh(**sizes), name)
    assert not decoder.embed.embedding[...].sharding.is_fully_replicated
    assert generate_ids(decoder, PROMPTS, (3,), 20) == alone


@pytest.mark.slow
def test_slots_are_filled_again_on_many_devices():
    """40 prompts in 16 slots over 4 devices, whose kv heads lie on two each: eight slots are filled at once."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 96, int(size)).tolist() for size in rng.integers(1, 16, 40)]
    for options in (sampling(), sampling(1.0, min_p=0.05, repetition_penalty=1.2)):
        alone, split = (
            generate_ids(decoder_on(mesh), prompts, (7, 21, 60, 33), 20, options=options, seed=1, batch_size=16)
            for mesh in (None, make_mesh(fsdp=4, tensor=2))
        )
        assert split == alone and len({len(answer.ids) for answer in alone}) > 4


@pytest.mark.slow
def test_two_processes_say_what_one_says():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, TESTS / "evaluation_sets.py"], env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    alone = everything_on(None)
    for out, _ in outputs:
        result = json.loads(out.splitlines()[-1])  # gloo prints before it
        assert result["ids"] == alone["ids"]
        assert result["values"] == pytest.approx(alone["values"], rel=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    tiny_config(folder)
    make_base(folder)
    return folder


def in_one_and_in_two_processes(folder, name, *arguments):
    """Runs a command in one process and in two, whose files go to folders of their own; returns the one, and both of the two."""
    common = [
        sys.executable, "-m", f"sft_jax.{name}", f"--config={ROOT / 'configs/sft.py'}", f"--config.data.train={folder / 'train.jsonl'}",
        f"--config.data.eval={folder / 'held_out.jsonl'}", "--config.data.max_length=96", "--config.model.compute_dtype=float32",
        f"--config.data.cache_dir={folder / 'cache'}", "--config.data.workers=1", "--batch_size=8", "--max_new_tokens=12", "--json", *arguments,
    ]  # fmt: skip
    files = {"evaluate": lambda place: f"--samples={folder}/{place}.jsonl", "compare": lambda place: f"--out={folder}/{place}"}[name]
    alone = subprocess.run([*common, files("alone")], env=environment(8, folder / "xdg"), capture_output=True, text=True, timeout=300)
    both = finish(start_commands([[*common, files(place)] for place in ("first", "second")], folder / "xdg"))
    for result in (alone, *both):
        assert result.returncode == 0, result.stderr[-2000:]
    assert both[1].stdout == ""  # the answer is the first one's
    return json.loads(alone.stdout), json.loads(both[0].stdout)


@pytest.mark.slow
def test_evaluate_in_two_processes_says_what_one_says(folder):
    alone, both = in_one_and_in_two_processes(folder, "evaluate", f"--model={folder / 'base'}", "--generate=10", "--scorer=token_f1")
    for name, value in alone["sets"]["eval"].items():
        assert both["sets"]["eval"][name] == (value if name == "scores" else pytest.approx(value, rel=1e-6)), name
    assert (folder / "first.jsonl").read_text() == (folder / "alone.jsonl").read_text() and not (folder / "second.jsonl").exists()


@pytest.mark.slow
def test_compare_in_two_processes_says_what_one_says(folder):
    alone, both = in_one_and_in_two_processes(
        folder, "compare", f"--model={folder / 'base'}", "--shots=1", "--generate=4", "--scorer=token_f1", "--latency=0",
    )  # fmt: skip
    assert both == alone and len(alone["contenders"]) >= 2
    for name in ("samples.jsonl", "results.json", "samples.html"):
        assert (folder / "first" / name).read_text() == (folder / "alone" / name).read_text()
    assert [path.read_text() for path in (folder / "second").iterdir()] == [""]  # of samples.jsonl, to see at once that it can be written
