"""The log files of a run, and what it shows while it trains."""

import io
import struct
import sys
import time
import types

import numpy as np
import psutil
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sft_jax.config import Config, LogConfig
from sft_jax.errors import UserError
from sft_jax.training.metrics import MetricsLog, cut_logs_back, evaluations, is_evaluated, last_training_record
from sft_jax.training import progress as progress_lib
from sft_jax.training import tensorboard
from sft_jax.training.profiler import Profiler
from sft_jax.training.progress import Phases, Progress
from sft_jax.training.workdir import Workdir


def with_log(**values) -> Config:
    return Config(log=LogConfig(**{"tensorboard": False, **values}))


def masked(content: bytes) -> bytes:
    """A checksum as TFRecord has it: rotated by 15 bits, plus a constant."""
    checksum = crc32c(content)
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + 0xA282EAD8) % 2**32)


def events(folder) -> list[list[Event]]:
    """Returns the events of every file, oldest file first."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.name.split(".")[-1]):
        content, found_here = path.read_bytes(), []
        while content:
            (size,), record = struct.unpack("Q", content[:8]), content[12:]
            assert (content[8:12], record[size : size + 4]) == (masked(content[:8]), masked(record[:size]))
            found_here.append(Event.FromString(content[12 : 12 + size]))
            content = content[12 + size + 4 :]
        found.append(found_here)
    return found


def test_every_start_has_an_event_file_that_hides_what_is_made_again(tmp_path):
    work = Workdir(tmp_path)
    for purge_step in (0, 4):
        with MetricsLog(work, with_log(tensorboard=True), purge_step) as log:
            log.write(4, "train", {"loss": 2.5, "grad_norm": None, "accuracy": float("nan")})
            log.write(100_000, "dätä", {"loss": -1e-9})
    files = events(tmp_path)
    assert len(files) == 2
    for file, purge_step in zip(files, (0, 4), strict=True):
        assert file[0].file_version == "brain.Event:2"
        assert (file[1].session_log.status, file[1].step) == (SessionLog.START, purge_step)
        scalars = [(event.step, event.summary.value[0].tag, event.summary.value[0].simple_value) for event in file[2:]]
        assert scalars == [(4, "train/loss", 2.5), (100_000, "dätä/loss", np.float32(-1e-9))]
        assert all(abs(event.wall_time - time.time()) < 60 for event in file)


def test_numbers_of_sections_have_curves_of_their_own(tmp_path):
    record = {"loss": 2.0, "slices": {"language": {"fr": {"loss": 3.0, "interval": [1.0, 2.0], "best": None}, "de": {"loss": 1}}}}
    with MetricsLog(Workdir(tmp_path), with_log(tensorboard=True), 0) as log:
        log.write(4, "held", record)
    ((_, _, *found),) = events(tmp_path)
    shown = {value.tag: value.simple_value for event in found for value in event.summary.value}
    assert shown == {"held/loss": 2.0, "held/slices/language/fr/loss": 3.0, "held/slices/language/de/loss": 1.0}


def test_a_full_disk_under_tensorboard_is_one_message(tmp_path, monkeypatch):
    log = MetricsLog(Workdir(tmp_path), with_log(tensorboard=True), 0)

    def full(content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard, "_record", full)
    with pytest.raises(UserError, match="tensorboard: .*no space left"), log:
        log.write(1, "train", {"loss": 1.0})


RECORDS = [
    {"step": 0, "split": "a", "loss": 9.0}, {"step": 0, "split": "b", "loss": 8.0}, {"step": 2, "split": "train", "loss": 7.0},
    {"step": 4, "split": "train", "loss": 6.0}, {"step": 4, "split": "a", "loss": 5.0}, {"step": 6, "split": "train", "loss": 4.0},
]  # fmt: skip


def test_what_the_log_says_of_evaluations():
    assert is_evaluated(RECORDS, 0, {"a", "b"}) and not is_evaluated(RECORDS, 4, {"a", "b"}) and is_evaluated(RECORDS, 4, {"a"})
    first, last = evaluations(RECORDS, {"a", "b"})
    assert first == {"a": {"loss": 9.0}, "b": {"loss": 8.0}} and last == {"a": {"loss": 5.0}, "b": {"loss": 8.0}}
    assert last_training_record(RECORDS) == {"loss": 4.0} and last_training_record([]) == {}


@pytest.mark.parametrize("step, again, kept", [(-1, True, 0), (4, False, 5), (4, True, 4), (9, False, 6)])
def test_logs_are_cut_back_to_what_is_not_written_again(tmp_path, step, again, kept):
    work = Workdir(tmp_path)
    work.append_lines("metrics.jsonl", RECORDS)
    work.append_lines("samples.jsonl", [{"step": 0}, {"step": 4}, {"step": 4}])
    cut_logs_back(work, step, again)
    assert work.read_lines("metrics.jsonl") == RECORDS[:kept]
    assert len(work.read_lines("samples.jsonl")) == {0: 0, 4: 1}.get(kept, 3)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_terminal_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(ZeroDivisionError), Progress(9, 0) as progress:
        progress.step(1)
        raise ZeroDivisionError
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") > 0  # cursor hidden, shown


def test_rates_are_shown_where_a_step_was_timed(capsys):
    record = {"epoch": 0.25, "loss": 1.5, "learning_rate": 1e-3, "grad_norm": 2.0}
    with Progress(9, 0) as progress:
        progress.record(1, record)
        progress.record(2, record | {"loss": None, "nonfinite_steps": 1.0})
        progress.record(3, record | {"seconds_per_step": 10.0, "real_tokens_per_second": 50.0, "supervised_tokens_per_second": 5.0})
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "step 1/9  epoch 0.25  loss 1.5000  lr 1.00e-03  grad 2.00"
    assert second == "step 2/9  epoch 0.25  lr 1.00e-03  grad 2.00  nonfinite 1"
    assert third.endswith("50 real and 5 supervised tokens/s  1m00s left")


def test_phases_add_up_to_the_life_of_the_process(monkeypatch):
    born = psutil.Process().create_time()
    now = types.SimpleNamespace(seconds=40.0)
    clock = types.SimpleNamespace(time=lambda: born + now.seconds, perf_counter=lambda: 1e6 + now.seconds)
    monkeypatch.setattr(progress_lib, "time", clock)

    def passes(seconds: float) -> None:
        now.seconds += seconds

    phases = Phases()
    with phases("train"):
        passes(5)
        with phases("evaluate"):
            passes(10)
        passes(1)
        with phases("evaluate"):
            passes(20)
    passes(2)
    assert phases.seconds == pytest.approx({"start": 40, "train": 6, "evaluate": 30, "other": 2})


@pytest.mark.parametrize("count, steps, traced", [(2, 9, [2, 3]), (2, 3, [1, 2]), (5, 3, [0, 1, 2]), (0, 9, [])])
def test_a_trace_is_made_of_the_steps_that_there_are(tmp_path, monkeypatch, count, steps, traced):
    running = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: running.append(folder))
    monkeypatch.setattr("jax.profiler.stop_trace", running.pop)
    found = []
    with Profiler(tmp_path, count, steps) as profiler:
        for done in range(steps):
            if profiler.begins(done):
                profiler.start()
            found += [done] if running else []
            if profiler.ends(done + 1):
                profiler.stop()
    assert found == traced and not running
