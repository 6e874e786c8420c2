"""Every number of config.json is read, and no field of the reference's configuration is overlooked, in every family."""

import copy
import dataclasses

import pytest
from tiny_models import ALL_CONFIGS

from sft_jax.errors import UserError
from sft_jax.model.families import FAMILIES, spec_from_config
from sft_jax.model.families.fields import UNSUPPORTED, Fields

# Numbers that do not change what the decoder computes: ids, lengths that only a scaling of rope reads, training.
HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "attention_dropout", "residual_dropout",
    "embedding_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "n_group", "topk_group", "mm_tokens_per_image",
    "image_token_index", "boi_token_index", "eoi_token_index",
}  # fmt: skip
# Fields of transformers' configurations that do not change it either: how a model is run, trained or stored.
NEUTRAL = HARMLESS | {
    "use_cache", "output_router_logits", "router_aux_loss_coef", "pretraining_tp", "dtype", "architectures", "chunk_size_feed_forward",
    "transformers_version", "output_hidden_states", "return_dict", "is_decoder", "id2label", "label2id", "problem_type",
    "tokenizer_class", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn", "num_mtp_layers", "ep_size", "hidden_dropout", "output_attentions", "classifier_dropout",
    "embedding_initializer_range",
}  # fmt: skip
# Read where they matter only, which is not in every configuration here.
CONDITIONAL = {
    "rope_parameters", "layer_types", "sliding_window", "max_window_layers", "n_group", "topk_group", "topk_method",
    "norm_topk_prob", "no_rope_layers", "no_rope_layer_interval", "sliding_window_pattern", "head_dim", "original_max_position_embeddings",
    "num_experts", "num_local_experts",
}  # fmt: skip


def numbers(node, path=()):
    """The paths of all numbers in a config.json, but those of a vision tower."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "vision_config":
            continue
        if isinstance(value, (dict, list)):
            yield from numbers(value, (*path, key))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (*path, key)


def changed(config: dict, path) -> dict:
    config = copy.deepcopy(config)
    node = config
    for key in path[:-1]:
        node = node[key]
    value = node[path[-1]]
    node[path[-1]] = 1 - value if value in (0, 1) and isinstance(value, int) else 2 * value
    return config


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_every_number_changes_the_spec(name):
    config = ALL_CONFIGS[name]
    spec = spec_from_config(config)
    unread = set()
    for path in numbers(config):
        try:
            same = spec_from_config(changed(config, path)) == spec
        except UserError:
            continue
        if same:
            unread.add(path[-1])
    assert unread <= HARMLESS | UNUSED.get(name, set()), unread


# What the file says and this configuration of the model does not use, as transformers does not.
UNUSED = {
    "llama_yarn": {"beta_fast"},  # no channel of so small a head turns as often
    "gpt_oss": {"beta_fast"},
    "deepseek_v2_groups": {"beta_fast"},
    "deepseek_v3": {"beta_fast"},
    "ministral3": {"beta_fast"},
    "olmo3": {"beta_fast"},
    "youtu": {"beta_fast"},
    "qwen2": {"max_window_layers"},  # layer_types says it
    "mixtral": {"num_experts"},
    "olmoe": {"moe_intermediate_size"},
}


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_no_field_of_the_reference_is_overlooked(name):
    """Each is read by the family, refused unless it is off, or known to change nothing."""
    transformers = pytest.importorskip("transformers")
    config = copy.deepcopy(ALL_CONFIGS[name])
    reference = type(transformers.AutoConfig.for_model(**copy.deepcopy(config)))
    fields = Fields(config)
    FAMILIES[config["architectures"][0]](fields)
    read = fields._read_names
    if name == "gemma3_multimodal":
        return  # its text section is the one of gemma3
    theirs = {field.name for field in dataclasses.fields(reference)} - {"attribute_map"}
    renamed = set(getattr(reference, "attribute_map", {}))
    overlooked = {field for field in theirs if not field.startswith("_")} - read - set(UNSUPPORTED) - NEUTRAL - CONDITIONAL - renamed
    assert not overlooked
