"""The main job on real input: a trained Llama checkpoint, GSM8K, kills at random moments, and the export in transformers."""

import json
import random
import subprocess
import time

import numpy as np
import pytest
from tiny_run import environment, final_checksums, metrics, run_command, train_command

from sft_jax.config import default_config

STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gsm8k")


@pytest.fixture(scope="module")
def config(assets, folder):
    config = default_config()
    config.model.path = str(assets / "models/stories260k")
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.data.train = str(assets / "datasets/gsm8k/train.jsonl")
    config.data.eval = str(assets / "datasets/gsm8k/test.jsonl")
    config.data.columns.prompt, config.data.columns.completion = "question", "answer"
    config.data.max_length, config.data.overlength = 512, "drop"
    config.data.cache_dir = str(folder / "cache")
    config.train.steps, config.train.batch_size = STEPS, 2
    config.optim.learning_rate = 1e-3
    config.log.every, config.log.tensorboard = 1, False
    config.checkpoint.every = 7
    return config


@pytest.fixture(scope="module")
def whole(config, folder):
    workdir = folder / "whole"
    result = run_command(config, workdir, folder / "xdg")
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.mark.slow
def test_sixty_steps_lower_the_held_out_loss(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["steps"] == STEPS
    first, last = summary["eval_first"]["eval"], summary["eval_last"]["eval"]
    assert last["loss"] < 0.6 * first["loss"] and last["tokens"] == first["tokens"] > 200_000
    report = json.loads((whole / "data_report.json").read_text())["train"]["sets"]["train"]
    assert report["rows_read"] == 7473 and report["over_length"]


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_bitwise_equal(whole, config, folder):
    workdir = folder / "killed"
    rng = random.Random(1)
    kills = 0
    while kills < 4:
        process = subprocess.Popen(
            train_command(config, workdir), env=environment(1, folder / "xdg"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        left = rng.randint(5, 16)
        for line in process.stdout:
            left -= line.startswith("step ")
            if left <= 0:
                time.sleep(rng.random() * 0.1)
                process.kill()
                break
        output, _ = process.communicate(timeout=300)
        assert process.returncode == -9, output
        kills += 1
    result = run_command(config, workdir, folder / "xdg")
    assert result.returncode == 0, result.stderr
    assert final_checksums(workdir) == final_checksums(whole)
    assert metrics(workdir) == metrics(whole)


@pytest.mark.slow
def test_the_export_has_the_same_logits_in_transformers(whole):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import sft_jax

    model, tokenizer = sft_jax.load(whole)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole / "export", dtype=torch.float32)
    text = "Natalia sold clips to 48 of her friends in April."
    ids = [*tokenizer.plain_prefix, *tokenizer.encode(text)]
    assert transformers.AutoTokenizer.from_pretrained(whole / "export")(text)["input_ids"] == ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(np.asarray(model(np.array([ids], np.int32))), expected, atol=1e-4, rtol=1e-4)
