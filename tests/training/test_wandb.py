"""The run on Weights & Biases, whose package is a module that writes down what it is asked for."""

import importlib
import json
import sys

import pytest
from tiny_run import tiny_config

from sft_jax import fit
from sft_jax.config import Config, LogConfig
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.training.metrics import MetricsLog
from sft_jax.training.wandb_run import check_wandb
from sft_jax.training.workdir import Workdir

FAKE = '''
class Error(Exception):
    pass

class Settings:
    def __init__(self, **values):
        self.values = values

class Run:
    def __init__(self, **values):
        self.values, self.logged, self.metrics, self.exit_code = values, [], [], None

    def define_metric(self, name, **values):
        self.metrics.append((name, values))

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code

runs, logins, refusal = [], [], None

def login():
    logins.append(True)
    if refusal:
        raise Error(refusal)

def init(**values):
    if "%" in values["project"]:
        raise Error("Invalid project name")
    runs.append(Run(**values))
    return runs[-1]
'''


@pytest.fixture
def wandb(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("site")
    (folder / "wandb.py").write_text(FAKE)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("wandb")
    sys.modules.pop("wandb", None)


def with_project(project: str) -> Config:
    return Config(seed=3, log=LogConfig(tensorboard=False, wandb=project))


def test_a_run_logs_the_records_of_metrics_jsonl(tmp_path, wandb):
    config = tiny_config(tmp_path, train__steps=3, data__eval={"held": str(tmp_path / "held_out.jsonl")}, eval__every=2, log__wandb="demo")
    fit(config, tmp_path / "run")
    (run,) = wandb.runs
    written = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in written] == [0, 1, 2, 2, 3, 3]
    expected = [
        {"step": record["step"]}
        | {f"{record['split']}/{name}": value for name, value in record.items() if name not in ("step", "split", "intervals")}  # numbers
        for record in written
    ]
    assert run.logged == expected and run.exit_code == 0 and wandb.logins == [True]
    assert run.values["project"] == "demo" and run.values["name"] == "run" and run.values["config"]["train"]["steps"] == 3
    assert run.metrics == [("step", {"hidden": True}), ("*", {"step_metric": "step"})]


def test_a_workdir_is_one_run_of_a_project(tmp_path, wandb):
    work = Workdir(tmp_path)
    for project in ("demo", "demo", "other", "other"):
        with MetricsLog(work, with_project(project), 0) as log:
            log.write(1, "train", {"loss": 2.0, "grad_norm": None, "accuracy": float("nan")})
    ids = [run.values["id"] for run in wandb.runs]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert all(run.values["resume"] == "allow" and run.logged == [{"step": 1, "train/loss": 2.0}] for run in wandb.runs)


@pytest.mark.parametrize("error, code", [(None, 0), (StoppedBySignal("Stopped"), 0), (ValueError("x"), 1), (KeyboardInterrupt(), None)])
def test_how_a_run_ends(tmp_path, wandb, error, code):
    try:
        with MetricsLog(Workdir(tmp_path), with_project("demo"), 0):
            if error is not None:
                raise error
    except type(error) if error is not None else ():
        pass
    assert wandb.runs[0].exit_code == code


def test_it_is_imported_only_where_it_is_asked_for(tmp_path, wandb):
    del sys.modules["wandb"]
    with MetricsLog(Workdir(tmp_path), with_project(""), 0) as log:
        log.write(1, "train", {"loss": 2.0})
    assert "wandb" not in sys.modules and not (tmp_path / "wandb.json").exists()


@pytest.mark.parametrize("left_behind", [False, True])
def test_a_missing_package_is_named_before_anything_is_prepared(tmp_path, monkeypatch, left_behind):
    """Also where a folder `wandb`, such as W&B leaves behind, looks like one."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not importlib.machinery.PathFinder.find_spec("wandb", [path])])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if left_behind:
        (tmp_path / "cwd/wandb").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / "cwd")
        assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(UserError, match=r"log.wandb: the package wandb is not installed; run pip install 'sft_jax\[wandb\]'"):
        fit(tiny_config(tmp_path, log__wandb="demo"), tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_what_it_refuses_is_one_message(tmp_path, wandb, monkeypatch):
    with pytest.raises(UserError, match=r"log.wandb: Invalid project name. Run 'wandb login'.*WANDB_MODE=offline"):
        MetricsLog(Workdir(tmp_path), with_project("a%b"), 0)
    wandb.refusal = "No API key configured."
    with pytest.raises(UserError, match=r"log.wandb: No API key configured. Run 'wandb login'"):
        check_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb()  # needs no login
