"""The quickstart as a user runs it: one command, from the committed base model to an export that transformers answers with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, environment

HELD_OUT = ROOT / "data/quickstart/held_out.jsonl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[str, Path]:
    """(what the command prints, the folder of the run)."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "sft_jax.train", "--config", "configs/quickstart.py", "--workdir", str(folder / "run")]
    result = subprocess.run(command, env=environment(1, folder / "xdg"), cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    return result.stdout, folder / "run"


@pytest.mark.slow
def test_the_base_model_cannot_do_the_task_and_the_tuned_one_can(finished):
    output, workdir = finished
    summary = json.loads((workdir / "summary.json").read_text())
    before, after = (summary[key]["held_out"]["exact_match"] for key in ("eval_first", "eval_last"))
    assert before < 0.05 and after >= 0.9
    assert f"held_out exact_match: {before:.4f} before, {after:.4f} after" in output
    assert f"The tuned model lies in {workdir / 'export'}." in output
    sample = json.loads((workdir / "samples.jsonl").read_text().splitlines()[-1])
    assert "before: " in output and "after:  " in output and json.loads(sample["generation"])["action"]


@pytest.mark.slow
def test_transformers_generates_the_same_tokens_from_the_export(finished):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import sft_jax

    _, workdir = finished
    theirs = transformers.AutoModelForCausalLM.from_pretrained(workdir / "export", dtype=torch.float32)
    reader = transformers.AutoTokenizer.from_pretrained(workdir / "export")
    stops = theirs.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    chats = [json.loads(line)["messages"][:1] for line in HELD_OUT.read_text().splitlines()[:40]]
    model, tokenizer = sft_jax.load(workdir / "export")
    ours = sft_jax.generate(model, tokenizer, chats, max_new_tokens=64, skip_special_tokens=False)
    for chat, answer in zip(chats, ours, strict=True):
        ids = reader.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = theirs.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        assert made[-1] in stops
        assert reader.decode(made[:-1]) == answer
