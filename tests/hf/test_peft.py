"""Adapters in the format of PEFT, in both directions, against peft itself on the same base.

Logits are compared in torch: those of peft's model with the adapter, and those of transformers' model with the weights that
we write with the adapter merged. A few cases compare the logits of our decoder with the adapter on it as well.
"""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from adapted import KINDS, adapted
from tiny_models import abstract, torch_model, twin

from sft_jax.errors import UserError
from sft_jax.hf.load import abstract_decoder, load, load_decoder
from sft_jax.hf.peft import save as save_lib
from sft_jax.hf.peft.read import read_adapter
from sft_jax.hf.peft.save import save_adapter
from sft_jax.hf.peft.settings import CONFIG, WEIGHTS
from sft_jax.hf.save import save
from sft_jax.hf.source import Provenance, Source
from sft_jax.hf.verify import ExportMismatch
from sft_jax.model.adapters import adaptable
from sft_jax.model.attach import merge
from sft_jax.model.options import Options
from sft_jax.model.sharding import make_mesh, named_leaves

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 20)).astype(np.int32)
pytestmark = pytest.mark.filterwarnings("ignore")


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS).long()).logits.float().numpy()


def our_logits(decoder) -> np.ndarray:
    return np.asarray(jax.jit(lambda d: d(TOKENS))(decoder))


def merged_logits(decoder, folder) -> np.ndarray:
    """Logits in transformers of what we write as the merged model."""
    save(decoder, None, folder, overwrite=True)
    return torch_logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"))


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


# ---- written here, read by peft

WRITTEN = {
    "llama": ("llama", KINDS["lora"]),
    "dora and a head": ("llama", KINDS["dora"] | dict(targets=["query", "down"], train=["lm_head"])),
    "rslora everywhere": ("llama", KINDS["rslora"] | dict(targets=["attention", "mlp", "lm_head", "embed"])),
    "pissa with dora": ("llama", KINDS["pissa_dora"] | dict(targets=["attention", "lm_head"])),
    "biases": ("qwen2", KINDS["pissa"] | dict(targets=["attention"], train=["query.bias", "norm"])),
    "tokens of both sides": ("llama", KINDS["lora"] | dict(targets=["query"], tokens=[3, 5])),
    "tied tokens and norms": ("gemma3", KINDS["lora"] | dict(targets=["query"], train=["norm"], tokens=[3, 5])),
    "tied head with an adapter": ("gemma3", KINDS["lora"] | dict(targets=["embed", "query"])),
    "tied head trained whole": ("gemma3", KINDS["lora"] | dict(targets=["query"], train=["embed"])),
    "some layers of a stack": ("gemma3", KINDS["dora"] | dict(targets=["runs.0.1.attention"])),
    "conv1d": ("gpt2", KINDS["pissa"] | dict(train=["embed.positions"])),
    "fused": ("phi3", KINDS["lora"]),
    "fused in part": ("phi3", KINDS["dora"] | dict(targets=["query", "gate"])),
    "fused pissa in part": ("phi3", KINDS["pissa"] | dict(targets=["value"])),
    "experts": ("mixtral", KINDS["lora"] | dict(train=["router"])),
    "one projection of experts": ("mixtral", KINDS["lora"] | dict(targets=["mlp.up"])),
    "alternating experts": ("gpt_oss", KINDS["pissa"] | dict(targets=["mlp"])),
    "experts, dense layers and shared experts": ("deepseek_v3", KINDS["lora"]),
    "shared experts": ("qwen2_moe", KINDS["lora"] | dict(targets=[r"mlp\.(gate|up|down)", r"shared\."])),
    "a shared MLP in one tensor": ("granite_moe_shared", KINDS["lora"]),
    "rows that are no tokens": ("granite", KINDS["dora"] | dict(targets=["query", "lm_head"], train=["embed"])),
    "tokens beside rows that are none": ("granite", KINDS["pissa"] | dict(targets=["query"], tokens=[3, 96])),
    "tied rows trained whole": ("gpt2", KINDS["lora"] | dict(targets=["query"], train=["embed.embedding"])),
    "tied rows that are no tokens": ("gpt2", KINDS["lora"] | dict(targets=["query", "embed"])),
    "beside a vision tower": ("gemma3_multimodal", KINDS["lora"] | dict(targets=["query"])),
}  # fmt: skip
QUICK = (
    "llama", "dora and a head", "biases", "tokens of both sides", "tied tokens and norms", "tied head with an adapter",
    "rows that are no tokens", "conv1d", "fused in part", "one projection of experts",
)  # fmt: skip
IN_JAX_TOO = ("dora and a head", "rows that are no tokens", "tokens beside rows that are none", "tied rows that are no tokens", "tied head with an adapter", "fused in part")


def cases(of: dict, quick) -> list:
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in of]


@pytest.mark.parametrize("case", cases(WRITTEN, QUICK))
def test_peft_loads_what_is_written(case, hf_folder, tmp_path):
    name, settings = WRITTEN[case]
    decoder, base = adapted(twin(name), **settings), hf_folder(name)
    decoder.source = dataclasses.replace(decoder.source, name=str(base))
    save_adapter(decoder, None, tmp_path / "adapter", Provenance(str(base)))
    with_peft = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model(name)), tmp_path / "adapter").eval()
    theirs = torch_logits(with_peft)
    assert np.abs(theirs - torch_logits(torch_model(name))).max() > 1e-2 * np.abs(theirs).max(), "the adapter does nothing"
    assert close(merged_logits(decoder, tmp_path / "merged"), theirs)
    if case in IN_JAX_TOO:
        assert close(our_logits(decoder), theirs) and close(our_logits(load_decoder(tmp_path / "adapter", Options())), theirs)
    if case not in ("tied head with an adapter", "tied rows that are no tokens"):  # which peft adds to the one matrix twice
        assert close(torch_logits(with_peft.merge_and_unload()), theirs)


def test_what_adapter_config_says(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(save_lib, "find_model", lambda name: hf_folder("llama"))  # of a hub id, which is in no cache here
    decoder = adapted(twin("llama"), **KINDS["rslora"] | dict(targets=["query", "value"]), dropout=0.1)
    report = save_adapter(decoder, None, tmp_path / "adapter", Provenance("some/base", "abc", 12, "f" * 64))
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (4, 5, True, 0.1)
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["base_model_name_or_path"] == "some/base"
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["peft_type"] == "LORA"
    assert report.tensors == 12 and report.difference < 1e-6
    assert json.loads((tmp_path / "adapter/sft_jax.json").read_text()) == {
        "base_model": "some/base", "data_fingerprint": "abc", "steps": 12, "base_fingerprint": "f" * 64,
    }  # fmt: skip
    assert "base_model: some/base" in (tmp_path / "adapter/README.md").read_text()
    peft.LoraConfig.from_pretrained(tmp_path / "adapter")


def test_what_is_read_back_must_be_what_was_written(hf_folder, tmp_path, monkeypatch):
    decoder = adapted(twin("llama"), **KINDS["lora"])
    written = save_lib.peft_adapter

    def damaged(*arguments):
        tensors, config = written(*arguments)
        name = next(name for name in tensors if name.endswith("k_proj.lora_B.weight"))
        return tensors | {name: tensors[name] * 1.01}, config

    monkeypatch.setattr(save_lib, "peft_adapter", damaged)
    with pytest.raises(ExportMismatch, match="what is added to runs.0.0.attention.key differs"):
        save_adapter(decoder, None, tmp_path / "adapter", Provenance(str(hf_folder("llama"))))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name, settings, message", [
    ("gpt_oss", KINDS["lora"] | dict(targets=["query"], train=["sinks"]), "^--adapter: .*sinks is trained beside other parts .*--merge"),
    ("phi3", KINDS["lora"] | dict(targets=["query"], train=["key.kernel"]), "^--adapter: .*key.kernel is trained beside other parts"),
    ("deepseek_v3", KINDS["dora"] | dict(targets=["runs.0.0.mlp.gate"]), "^--adapter: DoRA on .*gate_proj' has no form"),
])  # fmt: skip
def test_what_peft_has_no_form_for(name, settings, message, hf_folder, tmp_path):
    decoder = adapted(twin(name), **settings)
    with pytest.raises(UserError, match=message):
        save_adapter(decoder, None, tmp_path / "adapter", Provenance(str(hf_folder(name))))


@pytest.mark.parametrize("noise", [0.0, 1e-4])
@pytest.mark.parametrize("kind", ["pissa", "pissa_dora"])
def test_an_adapter_that_has_hardly_moved(kind, noise, hf_folder, tmp_path):
    """What PiSSA adds is then the difference of two products that are far larger."""
    decoder = adapted(twin("llama"), **KINDS[kind], trained=False)
    for _, node in adaptable(decoder):
        if node.adapter is not None:
            node.adapter.b.set_value(node.adapter.b[...] * (1 + noise))
    report = save_adapter(decoder, None, tmp_path / "adapter", Provenance(str(hf_folder("llama"))))
    assert report.tensors > 0


# ---- written by peft, read here

READ = {
    "dora and a head": ("llama", dict(target_modules=["q_proj", "down_proj"], use_dora=True, modules_to_save=["lm_head"])),
    "patterns": ("llama", dict(
        target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 4, "layers.1.self_attn.k_proj": 3},
        alpha_pattern={"v_proj": 7, "layers.0.self_attn.k_proj": 5},
    )),
    "embeddings": ("llama", dict(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "embeddings beside rows that are none": ("granite", dict(
        target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"],
    )),
    "some layers": ("llama", dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2])),
    "dora on some layers": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[0, 2], use_dora=True)),
    "tokens in any order": ("llama", dict(target_modules=["q_proj"], trainable_token_indices=[5, 3])),
    "tokens by module": ("llama", dict(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [5, 9]},
    )),
    "tokens of the embedding and a whole head": ("llama", dict(
        target_modules=["q_proj"], trainable_token_indices=[3, 5], modules_to_save=["lm_head"],
    )),
    "tokens of the embedding and a head with an adapter": ("llama", dict(
        target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 5],
    )),
    "tokens of the head and an embedding with an adapter": ("llama", dict(
        target_modules=["q_proj", "embed_tokens"], trainable_token_indices={"lm_head": [3, 5]},
    )),
    "norms": ("llama", dict(target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"])),
    "biases of adapted modules": ("qwen2", dict(target_modules=["q_proj"], bias="lora_only")),
    "all biases": ("llama_tied_biases", dict(target_modules=["q_proj"], bias="all")),
    "tied and kept so": ("gemma3", dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)),
    "tied whole and kept so": ("gemma3", dict(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True,
    )),
    "tied tokens": ("gemma3", dict(target_modules=["q_proj"], trainable_token_indices=[3, 5])),
    "conv1d": ("gpt2", dict(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)),
    "fused": ("phi3", dict(target_modules=["qkv_proj", "gate_up_proj", "o_proj"])),
    "fused dora": ("phi3", dict(target_modules=["qkv_proj"], use_dora=True)),
    "experts": ("mixtral", dict(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )),
    "one parameter of experts": ("mixtral", dict(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])),
    "alternating experts": ("gpt_oss", dict(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )),
    "router": ("qwen2_moe", dict(target_modules=["q_proj"], modules_to_save=["mlp.gate", "mlp.shared_expert_gate"])),
    "another beginning": ("llama", dict(target_modules=["q_proj"], init_lora_weights="orthogonal")),
}  # fmt: skip


def peft_adapter(name: str, folder, **settings):
    """Saves a trained adapter of peft and returns its model."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **dict(r=2, lora_alpha=3) | settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(torch_model(name)), config).eval()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", cases(READ, list(READ)[::3]))
def test_what_peft_writes_is_read(case, hf_folder, tmp_path):
    name, settings = READ[case]
    theirs = torch_logits(peft_adapter(name, tmp_path / "adapter", **settings))
    assert np.abs(theirs - torch_logits(torch_model(name))).max() > 1e-2 * np.abs(theirs).max()
    decoder = load_decoder(tmp_path / "adapter", Options(), base=hf_folder(name))
    assert close(merged_logits(decoder, tmp_path / "merged"), theirs)
    if case in ("patterns", "tokens by module", "experts", "embeddings beside rows that are none") or "tokens of" in case:
        assert close(our_logits(decoder), theirs)


def test_adapters_of_older_names(hf_folder, tmp_path):
    """One pair of matrices an expert, as adapters of transformers 4 have them."""
    decoder = adapted(twin("mixtral"), **KINDS["lora"] | dict(targets=["mlp"]))
    tensors, name = {}, "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.{}.lora_{}.weight"
    for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        adapter = getattr(decoder.runs[0][0].mlp, ours).adapter
        for layer in range(3):
            for expert in range(adapter.a.shape[1]):
                tensors[name.format(layer, expert, theirs, "A")] = np.ascontiguousarray(adapter.a[...][layer, expert].T)
                tensors[name.format(layer, expert, theirs, "B")] = np.ascontiguousarray(adapter.b[...][layer, expert].T)
    write(tmp_path, tensors, target_modules=["w1", "w2", "w3"], r=3, lora_alpha=6)
    again = load_decoder(tmp_path, Options(), base=hf_folder("mixtral"))
    for (_, ours), (_, theirs) in zip(adaptable(decoder), adaptable(again), strict=True):
        if ours.adapter is not None:
            np.testing.assert_array_equal(ours.adapter.change(), theirs.adapter.change())


def test_a_published_adapter(assets):
    """On a model of the shape of its base, which is not here: every number of the file is in its place."""
    import safetensors.numpy

    folder = assets / "models/lora_qwen2_5"
    config = {  # Qwen/Qwen2.5-0.5B-Instruct
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
        "use_sliding_window": False, "initializer_range": 0.02,
    }  # fmt: skip
    decoder = abstract_decoder(Source("qwen", json.dumps(config), None), Options(), make_mesh(1, 1, 1, jax.devices()[:1]))
    adapter = read_adapter(folder, decoder)
    assert [(module.path, module.rank, module.scale) for module in adapter.plan.modules] == [
        ("runs.0.0.attention.query", 8, 2.0), ("runs.0.0.attention.value", 8, 2.0),
    ]  # fmt: skip
    assert adapter.plan.dropout == 0.05 and adapter.settings.base == "Qwen/Qwen2.5-0.5B-Instruct"
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    assert sum(part.size for parts in adapter.values.values() for _, part in parts) == sum(x.size for x in tensors.values())
    for (layer,), part in adapter.values["runs.0.0.attention.value.adapter.b"]:
        theirs = tensors[f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_B.weight"]
        np.testing.assert_array_equal(part, theirs.T)
    with pytest.raises(UserError, match="base_model_name_or_path, the model that this adapter belongs to: .*Qwen2.5-0.5B"):
        load(folder)


# ---- refused by name


def write(folder, tensors: dict, **config) -> None:
    import safetensors.numpy

    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": None}
    (folder / CONFIG).write_text(json.dumps(values | config))


QUERY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def query_adapter(rank: int = 2, inputs: int = 32, layers=range(3)) -> dict:
    rng = np.random.default_rng(0)
    tensors = {QUERY.format(layer, "A"): rng.normal(size=(rank, inputs)) for layer in layers}
    tensors |= {QUERY.format(layer, "B"): rng.normal(size=(32, rank)) for layer in layers}
    return {name: x.astype(np.float32) for name, x in tensors.items()}


CONFIG_CHANGES = {
    "peft_type": ("LOHA", "peft_type is 'LOHA', and only adapters of type LORA"),
    "task_type": ("SEQ_CLS", "task_type is 'SEQ_CLS'"),
    "init_lora_weights": ("pissa_niter_4", "init_lora_weights is 'pissa_niter_4', which changes the base too"),
    "lora_bias": (True, "lora_bias is True, which is not computed here"),
    "layer_replication": ([[0, 2]], "layer_replication is .* not computed here"),
    "use_qalora": (True, "use_qalora is True, which is not computed here"),
    "a_new_option": ("on", "a_new_option is 'on', which is not computed here"),
    "r": (3, r"q_proj the rank 3 \(r, rank_pattern\), but its tensors have 2"),
    "lora_alpha": ("4", "lora_alpha is '4', which is no number"),
    "rank_pattern": ({"(": 2}, r"rank_pattern holds '\(', which is no regular expression"),
    "trainable_token_indices": ("all", "trainable_token_indices is 'all', which is no list of token ids"),
    "use_dora": (True, "'model.layers.0.self_attn.q_proj' has lora_A, lora_B, but its adapter is made of .*lora_magnitude_vector"),
}  # fmt: skip


@pytest.mark.parametrize("field", CONFIG_CHANGES)
def test_wrong_settings(field, tmp_path):
    value, message = CONFIG_CHANGES[field]
    write(tmp_path, query_adapter(), **{field: value})
    with pytest.raises(UserError, match=f"{tmp_path}/.*{message}"):
        read_adapter(tmp_path, abstract("llama"))


@pytest.mark.parametrize("ids", [[500], [-1], [3, 3]])
def test_wrong_ids_of_tokens(ids, tmp_path):
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    write(tmp_path, query_adapter() | {name: np.ones((len(ids), 32), np.float32)}, trainable_token_indices=ids)
    with pytest.raises(UserError, match=f"trainable_token_indices holds {ids[0]} twice, or it is no token of this model, which has 96"):
        read_adapter(tmp_path, abstract("llama"))


def test_dora_on_an_embedding(tmp_path):
    """peft computes it, from the whole table in every step; we say that we do not."""
    peft_adapter("llama", tmp_path, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    with pytest.raises(UserError, match="adapter_model.safetensors: adapter.name: embed is an embedding, whose adapters have no magnitudes"):
        read_adapter(tmp_path, abstract("llama"))


def test_wrong_tensors(tmp_path):
    def message_of(tensors: dict) -> str:
        write(tmp_path, tensors)
        with pytest.raises(UserError) as error:
            read_adapter(tmp_path, abstract("llama"))
        assert str(tmp_path) in str(error.value)
        return str(error.value)

    assert "lora_A.weight' has the shape [2, 48], but this model asks for [r, 32]" in message_of(query_adapter(inputs=48))
    assert "layers.3.self_attn.q_proj.lora_A.weight' has no place in this model; the adapter belongs to another base" in message_of(
        query_adapter(layers=range(4))
    )
    one = query_adapter()
    del one[QUERY.format(1, "B")]
    assert "'model.layers.1.self_attn.q_proj' has lora_A, but its adapter is made of lora_A, lora_B" in message_of(one)
    assert "is int64; adapters are" in message_of({QUERY.format(0, "A"): np.ones((2, 32), np.int64)})
    assert "holds no adapter" in message_of({})
    shutil.move(tmp_path / WEIGHTS, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="holds no adapter_model.safetensors, but adapter_model.bin; .* runs no code"):
        read_adapter(tmp_path, abstract("llama"))


@pytest.mark.parametrize("settings", [
    dict(target_modules=["q_proj", "embed_tokens"]), dict(target_modules=["lm_head"]),
    dict(target_modules=["q_proj", "embed_tokens", "lm_head"]), dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
])  # fmt: skip
def test_a_tied_head_with_an_adapter_on_one_side(settings, tmp_path):
    """Or with another one on each: merging would put the change of one side on both."""
    peft_adapter("gemma3", tmp_path, **settings)
    with pytest.raises(UserError, match="changes 'lm_head' and 'model.embed_tokens' differently, or one of them alone, but this model ties"):
        read_adapter(tmp_path, abstract("gemma3"))


def test_an_adapter_of_a_base_that_was_changed(hf_folder, tmp_path):
    """peft writes embeddings beside their adapters; they must be those of the base."""
    model = copy.deepcopy(torch_model("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1.0
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds embed.embedding beside an adapter of it, with other numbers than the base"):
        load_decoder(tmp_path, Options(), base=hf_folder("llama"))


def test_the_base_is_where_the_adapter_says_or_where_it_is_named(hf_folder, tmp_path):
    base = hf_folder("llama")
    write(tmp_path / "a", query_adapter(), base_model_name_or_path=str(base))
    decoder = load_decoder(tmp_path / "a", Options())
    assert decoder.source.provenance.base == str(base) and len(decoder.adapters.modules) == 1
    write(tmp_path / "b", query_adapter(), base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="base_model_name_or_path.*gone.* name the place where it is with --base"):
        load(tmp_path / "b")
    again, tokenizer = load(tmp_path / "b", base=base)
    assert tokenizer is None
    for (path, x), (_, y) in zip(named_leaves(decoder), named_leaves(again), strict=True):
        np.testing.assert_array_equal(x[...], y[...], err_msg=path)
    with pytest.raises(UserError, match="is no adapter but a model, so there is no base to name"):
        load(base, base=base)
    write(tmp_path / "b", query_adapter())
    with pytest.raises(UserError, match="base_model_name_or_path names no model"):
        load(tmp_path / "b")


def test_a_directory_with_an_adapter_and_a_model(hf_folder, tmp_path):
    """With the config.json of the base alone it is an adapter; with weights nobody can tell whether they have it in them."""
    base = hf_folder("llama")
    write(tmp_path / "a", query_adapter(), base_model_name_or_path=str(base))
    shutil.copy(base / "config.json", tmp_path / "a")
    assert load_decoder(tmp_path / "a", Options()).adapters is not None
    for path in base.glob("*.safetensors"):
        shutil.copy(path, tmp_path / "a")
    with pytest.raises(UserError, match="a: holds a model and an adapter .* name one of the two"):
        load(tmp_path / "a")


def test_an_adapter_of_a_moved_base_is_written_again(hf_folder, tmp_path):
    base = hf_folder("llama")
    decoder = adapted(load_decoder(base, Options()), **KINDS["lora"])
    save_adapter(decoder, None, tmp_path / "a", Provenance(str(base)))
    gone = {"base_model_name_or_path": str(tmp_path / "gone")}
    for name, changes in ((CONFIG, gone), ("sft_jax.json", {"base_model": str(tmp_path / "gone")})):
        (tmp_path / "a" / name).write_text(json.dumps(json.loads((tmp_path / "a" / name).read_text()) | changes))
    again = load_decoder(tmp_path / "a", Options(), base=base)
    assert again.source.provenance.base == str(base)
    save_adapter(again, None, tmp_path / "b", again.source.provenance)
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["base_model_name_or_path"] == str(base)


def test_an_adapter_knows_its_base(hf_folder, tmp_path):
    """By the fingerprint that is written beside it; a base of another dtype or family is another base."""
    base = load_decoder(hf_folder("llama"), Options())
    decoder = adapted(base, **KINDS["lora"])
    save_adapter(decoder, None, tmp_path / "a", Provenance(str(hf_folder("llama")), base_fingerprint=base.source.fingerprint))
    assert load_decoder(tmp_path / "a", Options()).adapters is not None
    save(merge(decoder), None, tmp_path / "other")
    with pytest.raises(UserError, match="a: .*other is not the model that these adapters were trained on: its tensors are others"):
        load_decoder(tmp_path / "a", Options(), base=tmp_path / "other")
