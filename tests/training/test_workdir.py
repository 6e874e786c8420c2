"""The folder of a run: locked, atomic, and cut back on resume."""

import json
import os
import subprocess
import sys

import pytest

from sft_jax.errors import UserError
from sft_jax.checkpoint.disk import disk_reason
from sft_jax.training.workdir import Workdir


def test_two_runs_cannot_share_a_folder(tmp_path):
    first = Workdir(tmp_path / "run")
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}.*another --workdir"):
        Workdir(tmp_path / "run")
    first.close()
    Workdir(tmp_path / "run").close()


def test_the_lock_goes_with_a_killed_process(tmp_path):
    code = f"import os, signal\nfrom sft_jax.training.workdir import Workdir\nw = Workdir({str(tmp_path)!r})\nos.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    Workdir(tmp_path).close()


@pytest.mark.parametrize("name, reason", [("file/run", "not a directory"), ("loop/run", "symbolic links"), ("x" * 300, "too long"),
                                          ("/proc/foo/bar", "no such file")])  # fmt: skip
def test_an_unwritable_place_is_one_message(tmp_path, name, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=f"could not be written .*{reason}"):
        Workdir(tmp_path / name)


def test_logs_are_cut_back(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.append_lines("metrics.jsonl", [{"step": step, "split": "train"} for step in range(1, 6)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "spl')  # a kill in the middle of a line
    until_3 = lambda record: record["step"] <= 3  # noqa: E731
    assert workdir.read_lines("metrics.jsonl")[-1]["step"] == 5 and workdir.read_lines("no_such_file") == []
    assert workdir.cut_back("metrics.jsonl", until_3) == 3
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert workdir.cut_back("metrics.jsonl", until_3) == 0 and workdir.cut_back("no_such_file", until_3) == 0


def test_a_record_ends_at_a_newline_and_nowhere_else(tmp_path):
    workdir = Workdir(tmp_path)
    texts = ["a\u2028b", "x\x85y", "\x0b\x0c\x1c", "é"]
    workdir.append_lines("samples.jsonl", [{"step": 1, "generation": text} for text in [*texts, "gone"]])
    assert workdir.cut_back("samples.jsonl", lambda record: record["generation"] != "gone") == 1
    assert [record["generation"] for record in workdir.read_lines("samples.jsonl")] == texts


def test_json_has_no_nan(tmp_path):
    workdir = Workdir(tmp_path)
    bad = {"step": 1, "loss": float("nan"), "all": [float("inf"), 1.0]}
    workdir.append_lines("metrics.jsonl", [bad])
    workdir.write_json("summary.json", bad)
    for name in ("metrics.jsonl", "summary.json"):
        assert json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": None, "all": [None, 1.0]}


def test_json_files_are_replaced_as_a_whole(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.read_json("summary.json") is None
    workdir.write_json("summary.json", {"text": "é"})
    assert workdir.read_json("summary.json") == {"text": "é"}
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json: is not JSON"):
        workdir.read_json("summary.json")


def test_reasons_are_found_behind_other_errors():
    try:
        try:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")
        except ValueError as error:
            raise RuntimeError("save failed") from error
    except RuntimeError as error:
        assert disk_reason(error) == "no space left on device"
    assert disk_reason(ValueError("shape mismatch")) is None
    assert disk_reason(RuntimeError("a replica is gone: file exists, permission denied")) is None  # says nothing of our disk
    try:
        try:
            open("/no/such/file")
        except OSError:
            raise ValueError("another error, while that one was handled")
    except ValueError as error:
        assert disk_reason(error) is None
    assert disk_reason(OSError(13, "denied")) == "permission denied"
