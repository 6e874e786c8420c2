"""What a run writes of each example: the sums that its log has, and the loss that each example has by itself."""

import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import assert_same_exposures, exposures, metrics, tiny_config

import sft_jax
from sft_jax.config_parsing import parse_config
from sft_jax.data.prepare import prepare
from sft_jax.dynamics.parts import part_name, read_documents
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.training.resolved import data_model

SEEN = 3  # steps before the one that is made by hand


def config_of(folder, **changes):
    """A mixture whose long rows are split, in micro-batches, over all kinds of axes of a mesh."""
    tiny_config(folder)
    sets = {"a": {"path": str(folder / "train.jsonl"), "overlength": "split"}, "b": {"path": str(folder / "held_out.jsonl"), "epochs": 3}}
    layout = dict(mesh__data=2, mesh__fsdp=1, mesh__tensor=2, mesh__context=2, train__micro_batch_size=4)
    saved = dict(data__max_length=64, checkpoint__every=SEEN, checkpoint__keep=9, train__steps=14)
    return tiny_config(folder, **{"data__train": sets, **saved, **layout, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ledger")


@pytest.fixture(scope="module")
def stream(folder):
    """The rows of the run."""
    config = parse_config(config_of(folder))
    config, tokenizer, vocab_size = data_model(config, print)
    rows = config.train.steps * config.train.batch_size
    return prepare(config.data, model_path=tokenizer, vocab_size=vocab_size, rows=rows).train


@pytest.fixture(scope="module")
def run(folder):
    """(its folder, the model as it was after SEEN steps)."""
    sft_jax.fit(config_of(folder), folder / "run")
    (folder / "begun/checkpoints").mkdir(parents=True)
    shutil.copytree(folder / f"run/checkpoints/{SEEN}", folder / f"begun/checkpoints/{SEEN}")
    for name in ("config.json", "manifest.json"):
        shutil.copy(folder / "run" / name, folder / "begun")
    return folder / "run", sft_jax.load(folder / "begun")[0]


def test_sums_are_those_of_the_log(run):
    found = exposures(run[0])
    records = [record for record in metrics(run[0]) if record["split"] == "train"]
    assert [record["step"] for record in records] == sorted(set(found.step.tolist()))
    for record in records:
        of_step = found.select(found.step == record["step"])
        weight = of_step.weight.sum(dtype=np.float64)
        assert weight == record["supervised_tokens"]  # every weight of these rows is 1
        np.testing.assert_allclose(of_step.loss_sum.sum(dtype=np.float64) / weight, record["loss"], rtol=1e-5)
        np.testing.assert_allclose(of_step.correct.sum(dtype=np.float64) / weight, record["accuracy"], rtol=1e-6)


def test_sums_are_those_of_each_document_by_itself(run, stream):
    """Through whole logits in float64, one document at a time, by the parameters that the step began with."""
    found = exposures(run[0])
    found = found.select(found.step == SEEN + 1)
    assert len(found) > 8
    forward = jax.jit(lambda model, tokens: model(tokens))
    for document, loss_sum, weight, correct in zip(found.document, found.loss_sum, found.weight, found.correct, strict=True):
        _, ids, weights = stream.document(int(document))
        padded = np.zeros((1, 65), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(forward(run[1], padded)[0, : len(ids) - 1], np.float64)
        highest = logits.max(-1, keepdims=True)
        log_p = logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
        nll = -log_p[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(loss_sum, (weights[1:] * nll).sum(), rtol=1e-4)
        assert weight == weights[1:].sum() and correct == weights[1:][logits.argmax(-1) == ids[1:]].sum()


def test_every_document_comes_up_as_often_as_the_plan_says(run, stream):
    found = exposures(run[0])
    np.testing.assert_array_equal(found.document, stream.plan.documents)
    documents = read_documents(run[0] / "ledger")
    names = [entry["name"] for entry in documents.sets]
    pieces = np.bincount(stream.documents.example)
    assert len(documents) == stream.document_count and pieces.max() > 1, "a row must be split"
    for number in range(len(documents)):
        name, file, line, turn = stream.identity(int(stream.documents.example[number]))
        assert (names[documents.set[number]], documents.files[documents.file[number]]) == (name, file)
        assert (documents.line[number], documents.turn[number], documents.row[number] + 1) == (line, turn, line)
        _, _, weights = stream.document(number)
        assert documents.supervised[number] == (weights[1:] > 0).sum()
    assert [entry["rows"] for entry in documents.sets] != ["", ""] and documents.plan_hash == stream.plan_hash


def test_parts_end_where_checkpoints_do_and_are_cut_back_to_them(run, folder):
    """Also a part that goes past the checkpoint, such as of a run that saved at other steps, and what was written later."""
    names = sorted(path.name for path in (run[0] / "ledger").glob("steps_*"))
    assert names == [part_name(*steps) for steps in ((1, 3), (4, 6), (7, 9), (10, 12), (13, 14))]
    killed = folder / "killed"
    shutil.copytree(run[0], killed)
    (killed / "summary.json").unlink()
    for step in (9, 12, 14):
        shutil.rmtree(killed / f"checkpoints/{step}")
    tables = [pq.read_table(killed / "ledger" / name) for name in names[1:3]]
    pq.write_table(pa.concat_tables(tables), killed / "ledger" / part_name(4, 9))
    for name in names[1:3]:
        (killed / "ledger" / name).unlink()
    (killed / "ledger" / names[4]).write_bytes(b"cut short")
    sft_jax.fit(config_of(folder), killed)
    assert_same_exposures(killed, run[0])


def test_a_step_that_was_left_out_has_no_loss_and_the_others_have(folder, monkeypatch):
    """The weights of one step are made infinite, so that its loss is not finite."""
    from sft_jax.training import step as step_module

    plain = step_module.next_token_loss

    def broken(decoder, batch, *rest, **options):
        sums = plain(decoder, batch, *rest, **options)
        bad = jax.numpy.where((batch.examples == 5).any(), jax.numpy.nan, 0.0)
        return sums._replace(total=sums.total + bad, nll=sums.nll + bad, per_example=sums.per_example + bad)

    monkeypatch.setattr(step_module, "next_token_loss", broken)
    config = tiny_config(folder, train__nonfinite="skip", train__steps=4, checkpoint__every=0)
    sft_jax.fit(config, folder / "skipping")
    found = exposures(folder / "skipping")
    bad = np.unique(found.step[found.document == 5])
    assert len(bad) == 1 and set(found.step) == {1, 2, 3, 4}
    np.testing.assert_array_equal(np.isnan(found.loss_sum), found.step == bad[0])
    assert (found.weight > 0).all()


def test_without_a_ledger_nothing_is_written_and_a_run_may_change_its_mind(folder):
    config = tiny_config(folder, train__steps=4, log__ledger=False, train__stop_after_steps=2)
    with pytest.raises(StoppedBySignal):
        sft_jax.fit(config, folder / "without")
    assert not (folder / "without/ledger").exists()
    sft_jax.fit(tiny_config(folder, train__steps=4), folder / "without")
    assert [path.name for path in sorted((folder / "without/ledger").iterdir())] == ["documents.parquet", part_name(3, 4)]


def test_a_damaged_file_is_named(run, tmp_path):
    shutil.copytree(run[0] / "ledger", tmp_path / "ledger")
    part = tmp_path / "ledger" / part_name(4, 6)
    content = bytearray(part.read_bytes())
    content[40] ^= 0xFF
    part.write_bytes(content)
    with pytest.raises(UserError, match=f"{part.name}: cannot be read"):
        exposures(tmp_path)
    (tmp_path / "ledger/documents.parquet").unlink()
    with pytest.raises(UserError, match="documents.parquet: is missing"):
        read_documents(tmp_path / "ledger")
