"""Loading tells how many bytes are in their place: a bar on a terminal, one line elsewhere."""

import json

import numpy as np
import pytest
import rich.console
import safetensors.numpy
from tiny_models import CONFIGS, random_decoder, to_tensors

from sft_jax.errors import UserError
from sft_jax.hf.files import SINGLE_FILE
from sft_jax.hf.load import load, load_decoder
from sft_jax.hf.progress import LoadProgress
from sft_jax.model.options import Options
from sft_jax.model.sharding import make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    decoder = random_decoder("llama")
    tensors = to_tensors(decoder, decoder, CONFIGS["llama"])
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / SINGLE_FILE)
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    return folder


@pytest.mark.parametrize("mesh", [None, (1, 8, 1)])
def test_every_byte_is_counted_once(mesh, folder):
    seen = []
    load(folder, mesh=mesh and make_mesh(*mesh), progress=lambda *counts: seen.append(counts))
    total = 4 * 31_712
    assert {count[1] for count in seen} == {total} and seen[-1][0] == total
    done = [count[0] for count in seen]
    assert done == sorted(set(done)) and len(done) == 30  # a step a tensor


def test_one_line_where_there_is_no_terminal(folder, capsys):
    with LoadProgress("some/model") as progress:
        load(folder, progress=progress)
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("Read 0.00 GB of some/model in ") and output.err.count("\n") == 1


@pytest.mark.parametrize(("init", "shown"), [("random", True), ("checkpoint", False)])
def test_nothing_where_nothing_is_read_or_another_process_tells(init, shown, folder, capsys):
    with LoadProgress("some/model", shown) as progress:
        load_decoder(folder, Options(), init=init, progress=progress)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(folder, monkeypatch, capsys):
    monkeypatch.setattr(rich.console.Console, "is_terminal", True)
    with LoadProgress("some/[model]") as progress:
        load(folder, progress=progress)
        assert progress._bar.finished
    assert "reading some/[model]" in capsys.readouterr().err


def test_a_load_that_fails_says_nothing_of_bytes(folder, capsys):
    with pytest.raises(UserError), LoadProgress("some/model") as progress:
        progress(5, 10)
        raise UserError("gone")
    assert capsys.readouterr().err == ""
