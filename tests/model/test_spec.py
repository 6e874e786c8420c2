"""config.json -> DecoderSpec: both forms of the file, what the fields mean, and every refusal."""

import dataclasses

import pytest
from tiny_models import CONFIGS

from sft_jax.errors import UserError
from sft_jax.model.families import FAMILIES, spec_from_config
from sft_jax.model import spec as spec_module
from sft_jax.model.spec import LayerSpec, LinearScaling, Llama3Scaling, MlpSpec, RopeSpec

# As published, without what does not matter here.
LLAMA2 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA32 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216, "max_position_embeddings": 8192,
    "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    "vocab_size": 256000,
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
PUBLISHED = {"llama2": LLAMA2, "llama3.2": LLAMA32, "gemma2": GEMMA2, "gemma3": GEMMA3}


def test_llama_from_the_old_form():
    spec = spec_from_config(LLAMA32)
    rope = RopeSpec(500000.0, 64, False, Llama3Scaling(32.0, 1.0, 4.0, 8192), 1.0, None)
    assert spec.layers == (LayerSpec(None, rope, MlpSpec(8192, True, "silu", False)),) * 16
    assert (spec.heads, spec.kv_heads, spec.head_size, spec.tied_head) == (32, 8, 64, True)
    assert spec.attention_scale == 64**-0.5 and spec.embedding_scale == 1.0 and spec.norm.offset == 0.0


def test_what_old_llama_files_leave_out():
    spec = spec_from_config({key: value for key, value in LLAMA2.items() if key != "num_key_value_heads"})
    assert spec.layers[0].rope == RopeSpec(10000.0, 128, False, None, 1.0, None) and spec.kv_heads == 32 and spec.head_size == 128


def test_gemma_from_the_old_form():
    two, three = spec_from_config(GEMMA2), spec_from_config(GEMMA3)
    assert [layer.window for layer in two.layers[:4]] == [4096, None, 4096, None]
    assert (two.attention_soft_cap, two.logit_soft_cap, two.tied_head, two.query_key_norm) == (50.0, 30.0, True, None)
    mlp = MlpSpec(6912, True, "gelu_pytorch_tanh", False)
    local = LayerSpec(512, RopeSpec(10000.0, 256, False, None, 1.0, None), mlp)
    whole = LayerSpec(None, RopeSpec(1000000.0, 256, False, LinearScaling(8.0), 1.0, None), mlp)
    assert three.layers == (*((local,) * 5 + (whole,)) * 4, local, local)
    assert (three.attention_soft_cap, three.query_key_norm, three.norm.offset) == (None, "head", 1.0)
    assert three.embedding_scale == 1152**0.5


@pytest.mark.parametrize("name", PUBLISHED)
def test_new_form_written_by_transformers_equals_old_form(name):
    """transformers reads the published file and writes the new form; both mean the same."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**PUBLISHED[name]).to_dict()
    assert "rope_theta" not in config and "rope_parameters" in config
    config["architectures"] = PUBLISHED[name]["architectures"]
    assert spec_from_config(config) == spec_from_config(PUBLISHED[name])


def test_scaling_falls_back_on_the_field_beside_it():
    old = {key: value for key, value in LLAMA32["rope_scaling"].items() if key != "original_max_position_embeddings"}
    assert spec_from_config({**LLAMA32, "rope_scaling": old}).layers[0].rope.scaling.original_length == 131072
    legacy = {"type": "linear", "factor": 2.0}
    rope = spec_from_config({**LLAMA2, "rope_scaling": legacy}).layers[0].rope
    assert rope == RopeSpec(10000.0, 128, False, LinearScaling(2.0), 1.0, None)


def test_no_number_has_a_default():
    classes = [value for value in vars(spec_module).values() if dataclasses.is_dataclass(value)]
    assert len(classes) > 12
    for cls in classes:
        for field in dataclasses.fields(cls):
            assert field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
def test_a_missing_field_is_named(name):
    """Every field that a family needs: without it, either the message names it or the file's format defines it."""
    config, needed = CONFIGS[name], []
    for field in config:
        try:
            spec_from_config({key: value for key, value in config.items() if key != field})
        except UserError as error:
            needed.append(field)
            assert field in str(error) or field == "rope_parameters", (field, error)
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    sizes |= {"rms_norm_eps"}
    own = {
        "llama": {"hidden_act"},
        "mistral": {"hidden_act", "sliding_window"},
        "gemma2": {"hidden_activation", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping",
                   "final_logit_softcapping"},
        "gemma3": {"hidden_activation", "sliding_window", "query_pre_attn_scalar", "rope_parameters"},
    }[name]  # fmt: skip
    assert sizes | own <= set(needed)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"architectures": ["LlamaForCausalLMs"]}, ("LlamaForCausalLMs", "did you mean 'LlamaForCausalLM'")),
        ({"architectures": []}, ("architectures", *FAMILIES)),
        ({"architectures": None}, ("architectures",)),
        ({"hidden_act": "relu6"}, ("hidden_act", "relu6", "silu")),
        ({"attention_dropout": 0.1}, ("attention_dropout", "0.1")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"rope_scaling": {"rope_type": "yarns", "factor": 4.0}}, ("yarns", "did you mean 'yarn'")),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, ("short_factor", "64")),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "mscale": 1.0}}, ("mscale", "linear")),
        ({"rope_scaling": {"rope_type": "linear"}}, ("factor", "rope_scaling")),
        ({"rope_scaling": {**LLAMA32["rope_scaling"], "low_freq_factor": 4.0}}, ("high_freq_factor",)),
        ({"layer_types": ["sliding_attention"] * 32}, ("layer_types", "full_attention")),
        ({"hidden_size": "4096"}, ("hidden_size", "'4096'")),
        ({"hidden_size": True}, ("hidden_size", "True")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers",)),
        ({"num_key_value_heads": 5}, ("num_key_value_heads", "num_attention_heads")),
        ({"num_attention_heads": 33, "num_key_value_heads": 33}, ("head_dim", "33")),
        ({"head_dim": 127}, ("even", "127")),
        ({"tie_word_embeddings": "no"}, ("tie_word_embeddings", "'no'")),
        ({"layer_types": [["x"]]}, ("layer_types", "['x']")),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers", "10000")),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps", "nan")),
        ({"rms_norm_eps": -1.0}, ("rms_norm_eps", "-1.0")),
        ({"rms_norm_eps": 10**400}, ("rms_norm_eps",)),
        ({"rope_theta": 0.0}, ("rope_theta", "above 0")),
        ({"rope_theta": float("inf")}, ("rope_theta", "inf")),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, ("factor", "rope_scaling", "above 0")),
        ({"rope_scaling": {**LLAMA32["rope_scaling"], "low_freq_factor": 0.0}}, ("low_freq_factor", "above 0")),
    ],
)
def test_refusals_name_the_field(change, named):
    with pytest.raises(UserError) as error:
        spec_from_config({**LLAMA2, **change})
    assert all(word in str(error.value) for word in named), str(error.value)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"layer_types": ["full_attention"]}, ("layer_types", "26")),
        ({"layer_types": ["full_attentions"] * 26}, ("full_attentions", "did you mean 'full_attention'")),
        ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping",)),
        ({"use_bidirectional_attention": True}, ("use_bidirectional_attention",)),
        ({"sliding_window": None}, ("sliding_window",)),
        ({"query_pre_attn_scalar": 0}, ("query_pre_attn_scalar", "above 0")),
        ({"query_pre_attn_scalar": -4}, ("query_pre_attn_scalar", "-4")),
        ({"final_logit_softcapping": 0.0}, ("final_logit_softcapping", "above 0")),
        ({"rope_local_base_freq": -1}, ("rope_local_base_freq", "-1")),
    ],
)
def test_gemma_refusals_name_the_field(change, named):
    with pytest.raises(UserError) as error:
        spec_from_config({**GEMMA3, **change})
    assert all(word in str(error.value) for word in named), str(error.value)


def test_gemma2_caps_are_above_0():
    with pytest.raises(UserError, match="'attn_logit_softcapping' must be a number above 0, not -1.0"):
        spec_from_config({**GEMMA2, "attn_logit_softcapping": -1.0})


def test_mistral_window():
    config = CONFIGS["mistral"]
    assert spec_from_config({**config, "sliding_window": None}).layers[0].window is None
    assert spec_from_config(config).layers[0].window == 8
