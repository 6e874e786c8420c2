"""Tokenizers on disk: loading, storing, exporting, aliases, and what is wrong with a directory."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
from tokenizer_texts import CONTROL, check_ranges
from transformers import AutoTokenizer

from sft_jax.data.tokenizers.tokens import load_stored_tokenizer, load_tokenizer, store_tokenizer
from sft_jax.errors import UserError

FOLDERS = ("tokenizers/llama2", "tokenizers/llama3", "tokenizers/qwen3", "models/stories260k")


@pytest.fixture(scope="module")
def loaded(assets):
    """Folder -> (our tokenizer, transformers'), each loaded once."""
    cache = {}

    def load(folder):
        if folder not in cache:
            cache[folder] = load_tokenizer(assets / folder), AutoTokenizer.from_pretrained(str(assets / folder))
        return cache[folder]

    return load


def test_the_same_after_pickling(loaded):
    ours, _ = loaded("tokenizers/llama2")
    other = pickle.loads(pickle.dumps(ours))
    assert other.encode("a</s> b") == ours.encode("a</s> b")
    assert (other.fingerprint, other.plain_prefix, other.chat_template) == (ours.fingerprint, (1,), ours.chat_template)


@pytest.mark.parametrize("path", ["tokenizers/llama2", "tokenizers/mistral_v3"])
def test_a_stored_tokenizer_needs_no_transformers(assets, tmp_path, path):
    ours = load_tokenizer(assets / path)
    store_tokenizer(ours, tmp_path / "t")
    code = (
        "import sys; from sft_jax.data.tokenizers.tokens import load_stored_tokenizer as load\n"
        f"t = load({str(tmp_path / 't')!r})\n"
        "assert not {'transformers', 'jax', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
        "print(t.encode('Hi</s> [INST] <|im_end|>é'), t.fingerprint, t.vocab_size)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{ours.encode('Hi</s> [INST] <|im_end|>é')} {ours.fingerprint} {ours.vocab_size}"
    load_stored_tokenizer(tmp_path / "t").save(tmp_path / "saved")
    ours.save(tmp_path / "original")
    for file in (tmp_path / "original").iterdir():
        assert file.read_bytes() == (tmp_path / "saved" / file.name).read_bytes()


def test_a_damaged_store_is_refused(assets, tmp_path):
    store_tokenizer(load_tokenizer(assets / "models/stories260k"), tmp_path)
    (tmp_path / "files" / "0").unlink()
    with pytest.raises(UserError, match="prepare the data again"):
        load_stored_tokenizer(tmp_path)


def test_the_fingerprint_follows_what_determines_ids_and_template(assets, loaded, tmp_path):
    ours, _ = loaded("tokenizers/llama2")
    seen = {ours.fingerprint, ours.with_chat_template("other").fingerprint, ours.with_chat_template(None).fingerprint}
    state = json.loads((assets / "tokenizers/llama2/tokenizer.json").read_text())
    state["model"]["merges"] = state["model"]["merges"][:-1]
    copy = copy_writable(assets / "tokenizers/llama2", tmp_path / "fewer")
    (copy / "tokenizer.json").write_text(json.dumps(state))
    seen.add(load_tokenizer(copy).fingerprint)
    config = json.loads((assets / "tokenizers/llama2/tokenizer_config.json").read_text())
    copy = copy_writable(assets / "tokenizers/llama2", tmp_path / "eos")
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<s>"}))
    seen.add(load_tokenizer(copy).fingerprint)
    assert len(seen) == 5
    assert load_tokenizer(assets / "tokenizers/llama2").fingerprint == ours.fingerprint
    assert ours.with_chat_template("other").with_chat_template(ours.chat_template).fingerprint == ours.fingerprint


def copy_writable(source, target):
    shutil.copytree(source, target)
    for path in [target, *target.iterdir()]:
        os.chmod(path, 0o755)
    return target


def test_save_copies_the_files(assets, loaded, tmp_path):
    ours, theirs = loaded("tokenizers/qwen3")
    ours.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (assets / "tokenizers/qwen3" / name).read_bytes()
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again("a <think> b\n").input_ids == theirs("a <think> b\n").input_ids
    assert again.chat_template == theirs.chat_template


@pytest.mark.parametrize("folder", ["tokenizers/llama2", "models/stories260k"])
def test_save_exports_the_template_of_the_run(loaded, tmp_path, folder):
    ours, theirs = loaded(folder)
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}é\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text("an older one")
    ours.with_chat_template(template).save(tmp_path)
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again.chat_template == template
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == template
    chat = [{"role": "user", "content": "Hi  there"}]
    wanted = theirs(f"{theirs.bos_token}[user] Hi  thereé\n", add_special_tokens=False)["input_ids"]
    assert (
        again.apply_chat_template(chat, return_dict=False)
        == wanted
        == load_tokenizer(tmp_path).encode(f"{theirs.bos_token}[user] Hi  thereé\n")
    )
    assert ours.chat_template == theirs.chat_template  # the original has not changed


def test_a_changed_template_replaces_all_named_ones(assets, tmp_path):
    source = copy_writable(assets / "tokenizers/llama2", tmp_path / "named")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(source)
    assert ours.chat_template == "D"
    ours.with_chat_template("N").save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(str(tmp_path / "out")).chat_template == "N"
    ours.save(tmp_path / "same")
    assert AutoTokenizer.from_pretrained(str(tmp_path / "same")).chat_template == {"default": "D", "tool_use": "T"}


@pytest.mark.parametrize(
    "folder", ["tokenizers/llama2", "tokenizers/qwen3", "models/stories260k", "tokenizers/mistral_v3"]
)
def test_aliases_take_the_place_of_added_tokens(loaded, folder):
    ours, _ = loaded(folder)
    aliases = {text: f"\ue000{index}\ue001" for index, text in enumerate(ours.added_tokens)}
    clone = ours.aliased(aliases)
    names = [name for name in (*CONTROL, "[INST]", "[/INST]", "[REFERENCE_DOC_1]") if name in ours.added_tokens]
    assert len(names) >= 2
    controls = set(ours.added_tokens.values())
    content = "x".join(names)
    for encoding in clone.encode_with_offsets([content, f"plain {content} text"]):
        assert not controls & set(encoding.ids.tolist())
    for plain in ("Hello  world\n½ 🤗", " leading", ""):
        assert clone.encode(plain) == ours.encode(plain)
    text = f"{names[0]}Hi there{names[1]}\n{names[1]} end"
    rewritten = text
    for name in names:
        rewritten = rewritten.replace(name, aliases[name])
    encoding = clone.encode_with_offsets([rewritten])[0]
    assert encoding.ids.tolist() == ours.encode(text) == clone.encode(rewritten)
    check_ranges(rewritten, encoding)


@pytest.mark.parametrize("folder", ["models/stories260k", "tokenizers/mistral_v3"])
def test_an_alias_for_some_tokens_leaves_the_others(loaded, folder):
    ours, _ = loaded(folder)
    clone = pickle.loads(pickle.dumps(ours.aliased({"</s>": "\ue000"})))
    assert clone.encode("<s>\ue000") == [ours.bos_id, ours.eos_id] == ours.encode("<s></s>")
    assert ours.eos_id not in clone.encode("</s>")


def test_a_directory_without_a_tokenizer(assets, tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer.*tokenizer.json"):
        load_tokenizer(tmp_path)
    # A tokenizer_config.json alone makes transformers invent a tokenizer of the 22 tokens that it lists.
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(assets / "models/lora_qwen2_5")
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UserError, match="tekken.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "BPE"}}', ""])
def test_a_damaged_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_code_of_a_model_repository_is_not_run(assets, tmp_path):
    source = copy_writable(assets / "models/stories260k", tmp_path / "remote")
    config = {"auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}, "tokenizer_class": "EvilTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Fast: pass\n")
    with pytest.raises(UserError, match="code of a model repository is never run"):
        load_tokenizer(source)
    assert not (tmp_path / "ran").exists()


def test_paths_that_are_neither_here_nor_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer("/no/such/directory")
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer("./missing/model")
    with pytest.raises(UserError, match="some-org/some-model-xyz.*hub"):
        load_tokenizer("some-org/some-model-xyz")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(tmp_path / "notes.txt")


def test_the_file_itself(assets):
    folder = assets / "models/stories260k"
    assert load_tokenizer(folder / "tokenizer.json").fingerprint == load_tokenizer(folder).fingerprint
    assert type(load_tokenizer(folder / "tokenizer.model")) is not type(load_tokenizer(folder))
