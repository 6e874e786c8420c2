"""Hugging Face data sets, as the `datasets` package writes them, and as the hub has them."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest
from huggingface_hub import errors
from row_kinds import saved

from sft_jax.data.sources.hf_sets import snake_case
from sft_jax.data.sources.registry import open_rows
from sft_jax.errors import UserError

CONTENT = [{"n": number, "messages": [{"role": "user", "content": f"é{number}"}], "extra": None} for number in range(10)]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """Returns the package, which keeps its cache in a folder of the test."""
    package = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return package


def rows_of(name, tmp_path, lines=None):
    return open_rows([str(name)], "data.train", tmp_path / "own", (lambda line: None) if lines is None else lines.append)


def refused(name, tmp_path, message):
    with pytest.raises(UserError) as caught:
        rows_of(name, tmp_path)
    assert str(caught.value) == f"data.train: {name}{message}"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_data_set_saved_to_disk(datasets, tmp_path, shards, prefix):
    datasets.Dataset.from_list(CONTENT).save_to_disk(tmp_path / "saved", num_shards=shards)
    rows = rows_of(f"{prefix}{tmp_path}/saved", tmp_path)
    assert list(rows) == list(datasets.load_from_disk(tmp_path / "saved")) == CONTENT
    assert str(rows.where(9)) == f"{prefix}{tmp_path}/saved/data-0000{shards - 1}-of-0000{shards}.arrow:{10 if shards == 1 else 3}"


def test_selected_and_shuffled_rows(datasets, tmp_path):
    chosen = datasets.Dataset.from_list(CONTENT).shuffle(seed=1).select(range(4))
    chosen.save_to_disk(tmp_path / "saved")
    assert list(rows_of(tmp_path / "saved", tmp_path)) == list(chosen)


def test_several_splits(datasets, tmp_path):
    whole = datasets.Dataset.from_list(CONTENT)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(2))}).save_to_disk(tmp_path / "saved")
    assert list(rows_of(f"hf:{tmp_path}/saved:test", tmp_path)) == CONTENT[:2]
    assert list(rows_of(tmp_path / "saved/train", tmp_path)) == CONTENT
    name = f"hf:{tmp_path}/saved:train"
    refused(tmp_path / "saved", tmp_path, f": has the splits train, test; name one of them, such as {name}.")
    refused(f"hf:{tmp_path}/saved:dev", tmp_path, f": has no split 'dev' but train, test; name one of them, such as {name}.")
    refused(f"hf:{tmp_path}/saved/train:test", tmp_path, ": is one data set and has no split 'test'; leave it out.")


def test_columns_of_json(datasets, tmp_path):
    content = [{"a": {"x": [1, None]}}, {"a": None}, {"a": ["text"]}]
    features = datasets.Features({"a": datasets.Json()})
    datasets.Dataset.from_list(content, features=features).save_to_disk(tmp_path / "saved")
    assert list(rows_of(tmp_path / "saved", tmp_path)) == content


def test_what_is_wrong_with_a_saved_data_set(datasets, tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(CONTENT).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    refused(
        folder, tmp_path, ": was saved with a mapping of its rows, which is not read; load it with `datasets` and save flatten_indices() of it."
    )  # fmt: skip
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": None}))
    refused(folder, tmp_path, ": its state.json names no files; save it again.")
    (folder / "state.json").write_text("{")
    message = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    refused(folder, tmp_path, f": {folder}/state.json cannot be read ({message}); save the data set again.")
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "data-00000-of-00001.arrow").unlink()
    refused(folder, tmp_path, f": {folder}/data-00000-of-00001.arrow is missing, which its state.json names; copy it again.")


@pytest.mark.parametrize("name", ["gsm8k", "CodeAlpaca_20K", "UltraChat200k", "aBC", "HTTPServer"])
def test_names_of_files_are_those_of_the_package(datasets, name):
    assert snake_case(name) == datasets.naming.camelcase_to_snakecase(name)


def test_what_load_dataset_has_left(datasets, tmp_path):
    class Rows(datasets.GeneratorBasedBuilder):
        VERSION = datasets.Version("1.0.0")
        BUILDER_CONFIGS = [datasets.BuilderConfig(name=name) for name in ("main", "other")]

        def _info(self):
            return datasets.DatasetInfo(features=datasets.Dataset.from_list(CONTENT).features)

        def _split_generators(self, _):
            return [datasets.SplitGenerator("train", {"count": 10}), datasets.SplitGenerator("test", {"count": 3})]

        def _generate_examples(self, count):
            yield from enumerate(CONTENT[:count])

    cache = str(tmp_path / "cache")
    Rows(cache_dir=cache, repo_id="some-one/MathRows", dataset_name="MathRows", config_name="main").download_and_prepare()
    lines = []
    assert list(rows_of("hf:some-one/MathRows:train", tmp_path, lines)) == CONTENT
    assert len(lines) == 1 and lines[0].startswith("data.train: hf:some-one/MathRows:train: is read from ")
    assert list(rows_of("hf:some-one/MathRows/main:test", tmp_path)) == CONTENT[:3]
    Rows(cache_dir=cache, repo_id="some-one/MathRows", dataset_name="MathRows", config_name="other").download_and_prepare()
    refused(
        "hf:some-one/MathRows:train", tmp_path, ": has several configurations, main, other; name one, such as hf:some-one/MathRows/main:train."
    )  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in memory: `files` are those of the branch with Parquet; `down` is why it cannot be reached."""
    files, folder, state = {}, tmp_path / "snapshots/abc", types.SimpleNamespace(down=None, calls=0)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "none"))

    def dataset_info(self, name, revision):
        assert (name, revision) == ("some-one/rows", "refs/convert/parquet")
        state.calls += 1
        if state.down:
            raise state.down
        return types.SimpleNamespace(sha="abc", siblings=[types.SimpleNamespace(rfilename=file) for file in files])

    def snapshot_download(name, repo_type, revision, allow_patterns):
        assert (name, repo_type, revision) == ("some-one/rows", "dataset", "abc")
        for file in allow_patterns:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            pa.parquet.write_table(pa.Table.from_pylist(files[file]), folder / file)
        return str(folder)

    def try_to_load_from_cache(name, file, revision, repo_type):
        assert (name, repo_type, revision) == ("some-one/rows", "dataset", "abc")
        return str(folder / file) if (folder / file).is_file() else None

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", try_to_load_from_cache)
    state.files, state.folder = files, folder
    return state


def test_parquet_of_the_hub_is_fetched_once(hub, tmp_path):
    hub.files.update({
        "default/train/0000.parquet": CONTENT[:6], "default/train/0001.parquet": CONTENT[6:], "default/test/0000.parquet": CONTENT[:1],
        ".gitattributes": [],
    })  # fmt: skip
    lines = []
    rows = rows_of("hf:some-one/rows:train", tmp_path, lines)
    assert list(rows) == CONTENT and str(rows.where(6)) == "hf:some-one/rows:train/0001.parquet:1"
    assert lines == ["data.train: hf:some-one/rows:train: fetching 2 Parquet file(s) from the Hugging Face hub."]
    assert sorted(path.name for path in hub.folder.rglob("*.parquet")) == ["0000.parquet", "0001.parquet"]
    hub.down = errors.OfflineModeIsEnabled("no network")
    assert list(rows_of("hf:some-one/rows:train", tmp_path)) == CONTENT and hub.calls == 1
    next(hub.folder.rglob("0001.parquet")).unlink()  # never fewer rows than there are
    refused(
        "hf:some-one/rows:train", tmp_path,
        ": is neither a folder here nor in the caches, and cannot be had as Parquet from the Hugging Face hub (no network); check the "
        "name, the network and your access, or download it where there is a network, save it with save_to_disk and name that folder.",
    )  # fmt: skip


def test_configurations_and_splits_of_the_hub(hub, tmp_path):
    hub.files.update({"a/train/0000.parquet": CONTENT, "b/partial-train/0000.parquet": CONTENT})
    assert list(rows_of("hf:some-one/rows/a:train", tmp_path)) == CONTENT
    name = "hf:some-one/rows"
    refused(f"{name}:train", tmp_path, f": has several configurations, a, b; name one, such as {name}/a:train.")
    refused(f"{name}/a:test", tmp_path, f": there is no such split; the hub has {name}/a:train, {name}/b:partial-train.")
    refused(
        f"{name}/b:train", tmp_path,
        ": is so large that the hub has only the first part of it as Parquet; download its own files and name them.",
    )  # fmt: skip
    hub.files.clear()
    refused(f"{name}:train", tmp_path, ": there is no such split; the hub has no Parquet of this data set.")


@pytest.mark.parametrize("name", ["hf:", "hf:/no/such/folder", "hf:./folder:train", "hf:owner/name", "hf:a/b/c/d:train"])
def test_names_that_cannot_be_read(name, tmp_path):
    refused(
        name, tmp_path,
        ": there is no such folder, and it is no name on the hub, which is written hf:owner/name:split or hf:owner/name/config:split; "
        "check the spelling.",
    )  # fmt: skip


def test_the_package_is_not_needed(tmp_path):
    name = saved(tmp_path, CONTENT)
    code = f"import sys; from sft_jax.data.sources.registry import open_rows; open_rows([{name!r}], 'x')[9]; sys.exit('datasets' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
