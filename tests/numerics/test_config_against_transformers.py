"""config.json as it is found in the wild: we compute what transformers computes from the same file, or refuse it by name.

Each case is a file that says something twice, leaves something out, or sets a field that few models set. No case may be
read in another way than transformers reads it.
"""

import copy

import jax
import numpy as np
import pytest
from tiny_models import CONFIGS, from_tensors

from sft_jax.errors import UserError
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.options import Options

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LEFT_OUT = object()
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LINEAR = {"rope_type": "linear", "factor": 4.0}
ORIGINAL = "original_max_position_embeddings"
OLD = {"rope_parameters": LEFT_OUT, "rope_theta": 500.0}  # the form before transformers 5
OLD_GEMMA3 = {"rope_parameters": LEFT_OUT, "rope_theta": 10000.0, "rope_local_base_freq": 100.0}
FULL = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 333.0}}}

READ = {  # name -> (base, changes)
    "original length beside the scaling and in it": ("llama", {**OLD, ORIGINAL: 64, "rope_scaling": {**LLAMA3, ORIGINAL: 16}}),
    "original length beside the scaling": ("llama", {**OLD, ORIGINAL: 16, "rope_scaling": LLAMA3}),
    "no original length": ("llama", {**OLD, "rope_scaling": LLAMA3}),
    "original length of the new form": ("llama", {ORIGINAL: 64, "rope_parameters": {**LLAMA3, "rope_theta": 500.0, ORIGINAL: 16}}),
    "empty rope_scaling": ("llama", {**OLD, "rope_scaling": {}}),
    "both forms": ("llama", {"rope_theta": 500.0, "rope_scaling": LINEAR}),
    "theta beside the new form": ("llama", {"rope_theta": 500.0, "rope_parameters": LINEAR}),
    "theta twice": ("llama", {"rope_theta": 77.0}),
    "partial_rotary_factor 1": ("llama", {"partial_rotary_factor": 1.0}),
    "a window that Llama has not": ("llama", {"sliding_window": 8}),
    "head_dim null": ("llama", {"head_dim": None}),
    "kv heads null": ("llama", {"num_key_value_heads": None}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "gelu_new": ("llama", {"hidden_act": "gelu_new"}),
    "dropout that nobody reads": ("llama", {"hidden_dropout": 0.5}),
    "Mistral without a window": ("mistral", {"sliding_window": None}),
    "a bias that Mistral has not": ("mistral", {"attention_bias": True}),
    "Gemma 2 without layer_types": ("gemma2", {"layer_types": LEFT_OUT}),
    "Gemma 2, all layers global": ("gemma2", {"layer_types": ["full_attention"] * 5}),
    "Gemma 2 with a head": ("gemma2", {"tie_word_embeddings": False}),
    "Gemma 2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "Gemma 2 with biases": ("gemma2", {"attention_bias": True}),
    "Gemma 2, nothing about direction": ("gemma2", {"use_bidirectional_attention": None}),
    "Gemma 3, both forms": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "Gemma 3, old form": ("gemma3", {**OLD_GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "Gemma 3, theta in the old scaling": ("gemma3", {**OLD_GEMMA3, "rope_scaling": {**LINEAR, "rope_theta": 50.0}}),
    "Gemma 3, original length beside": ("gemma3", {**OLD_GEMMA3, ORIGINAL: 16, "rope_scaling": LLAMA3}),
    "Gemma 3, every third layer": ("gemma3", {**OLD_GEMMA3, "layer_types": LEFT_OUT, "sliding_window_pattern": 3}),
    "Gemma 3 with a logit cap": ("gemma3", {"final_logit_softcapping": 2.0}),
    "Gemma 3 with biases": ("gemma3", {"attention_bias": True}),
}  # fmt: skip

REFUSED = {  # name -> (base, changes, what the message names)
    "not causal": ("llama", {"is_causal": False}, "is_causal"),
    "both directions": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "an activation of another family": ("llama", {"hidden_act": "quick_gelu"}, "quick_gelu"),
    "a factor of no scaling": ("llama", {"rope_parameters": {"rope_theta": 500.0, "factor": 2.0}}, "factor"),
    "half of the head rotated": ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "one rope of two": ("gemma3", {**FULL, "rope_local_base_freq": 100.0}, "sliding_attention"),
    "old name of the activation": ("gemma2", {"hidden_activation": LEFT_OUT, "hidden_act": "gelu"}, "hidden_activation"),
    "kv heads of Mistral": ("mistral", {"num_key_value_heads": LEFT_OUT}, "num_key_value_heads"),
    "kv heads of Gemma": ("gemma2", {"num_key_value_heads": LEFT_OUT}, "num_key_value_heads"),
    "head_dim of Gemma": ("gemma3", {"head_dim": LEFT_OUT}, "head_dim"),
}  # fmt: skip


def changed(base: str, changes: dict) -> dict:
    return copy.deepcopy({key: value for key, value in {**CONFIGS[base], **changes}.items() if value is not LEFT_OUT})


def their_model(config: dict):
    """A transformers model of the file, every parameter random."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.15) * torch.randn_like(parameter))
    return model.eval()


FORWARD = jax.jit(lambda decoder, tokens: decoder(tokens))


@pytest.mark.parametrize("case", READ)
def test_read_as_transformers_reads_it(case):
    base, changes = READ[case]
    tokens = np.random.default_rng(1).integers(0, 96, (1, 48)).astype(np.int32)
    theirs = their_model(changed(base, changes))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()
    spec = spec_from_config(changed(base, changes))
    abstract = jax.eval_shape(lambda: Decoder(spec, Options(), jax.random.key(0)))
    tensors = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    ours = from_tensors(abstract, tensors, changed(base, changes))
    np.testing.assert_allclose(FORWARD(ours, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    base, changes, named = REFUSED[case]
    with pytest.raises(UserError, match=named):
        spec_from_config(changed(base, changes))
