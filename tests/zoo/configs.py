"""Make any configuration of transformers tiny, by the names of its fields.

The rules below hold for every model; `OVERRIDES` holds what one model type needs besides.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from tests.zoo.overrides import OVERRIDES

WIDTH, HEADS, HEAD_DIM, LAYERS, EXPERTS = 32, 2, 16, 2, 4
VOCAB = 64
SPECIAL = 40  # ids from here on are special tokens, below it text
IMAGE, PATCH = 32, 8
FRAMES, MELS = 20, 16  # of sound; Whisper's encoder takes exactly 2 * max_source_positions
POSITIONS = 128
LABELS = 3

# The first pattern that matches the whole name of a field decides; lists keep their length.
RULES: tuple[tuple[str, Any], ...] = (
    (r"\w*(dropout|drop_?path|drop_rate|layer_?drop|_pdrop|drop_prob)\w*|\w+_drop", 0.0),
    (r"mask_(time|feature)_prob|\w*jitter\w*", 0.0),
    (r"\w*key_value(_attention)?_heads\w*|num_kv_heads|\w*_kv_heads", HEADS),
    (r"\w*(num|n)_(attention_)?heads?|\w*attention_heads|n_head|heads|\w+_num_heads", HEADS),
    (r"num_attention_heads_per_layer|linear_num_(key|value)_heads|\w*n_heads", HEADS),
    (r"(attention_|linear_)?(key_|value_)?head_(dim|size)|d_kv|head_size|attention_head_size", 16),
    (r"\w*(qk_nope|v)_head_dim|index_head_dim|\w+_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim", 8),
    (r"(q|kv|o)_lora_rank|\w+_lora_rank|\w+_low_rank_dim", 16),
    (r"\w*(num|n)_(hidden_|encoder_|decoder_|\w*transformer_)?layers?|n_layer|depths?", LAYERS),
    (r"(\w+_)?(encoder|decoder|attention|text|audio|vision)_layers", LAYERS),
    (r"(num|n)_(blocks|stages_blocks)", LAYERS),
    (r"(num|n)_(local_|routed_)?experts|num_experts|moe_num_experts|\w*num_experts", EXPERTS),
    (r"num_experts_per_tok\w*|moe_topk|moe_k|top_k_experts|expert_top_k|num_selected_experts", 2),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"max_source_positions", FRAMES // 2),
    (r"num_mel_bins", MELS),
    (r"train_num_points", 64),
    (r"max_position_embeddings|n_positions|max_target_positions|max_seq_len\w*", POSITIONS),
    (r"(\w+_)?vocab_size\w*", VOCAB),
    (r"\w*(intermediate|ffn|inner|feed_?forward|mlp)_(size|dim|hidden_size)\w*|d_ff|n_inner", 48),
    (r"\w*hidden_(size|dim)s?|\w*(d_model|n_embd|embed_dim|embedding_size|embeddings_size)", WIDTH),
    (
        r"\w*(projection|proj|embedding|output|out|pooler_output|text|pooled)_(dim|size|hidden_size)",
        32,
    ),
    (r"dim|encoder_dim|decoder_dim|width|channels|hidden|units", WIDTH),
    (r"(\w+_)?image_size", IMAGE),
    (r"patch_size", PATCH),
)


def tiny(config_class: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    """Return a configuration of this class with everything small, and these settings."""
    names = {i: f"label {i}" for i in range(settings.pop("num_labels", LABELS))}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    config = shrink(config_class(), labels | settings)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    return config


def shrink(config: PreTrainedConfig, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the configuration shrunk by the rules, the overrides of its type and the settings."""
    given = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    if "use_cache" in given:
        given["use_cache"] = False
    special = iter(range(SPECIAL, VOCAB))
    values = {k: small(k, v, config, special) for k, v in given.items()}
    values |= OVERRIDES.get(config.model_type, {}) | dict(settings)
    for name in (
        "transformers_version",
        "architectures",
        "model_type",
        "ignore_keys_at_rope_validation",
    ):
        values.pop(name, None)
    return type(config)(**values)


def small(name: str, value: Any, config: PreTrainedConfig, special: Any) -> Any:
    if isinstance(value, PreTrainedConfig):
        return shrink(value, {})
    if name.endswith(("token_id", "token_index", "_token_ids")):
        return token(name, value, special)
    if name == "rope_parameters" and isinstance(value, Mapping):
        return rope(value, "mrope_section" in config.ignore_keys_at_rope_validation)
    if is_pyramid(config):
        if name in ("num_layers", "patch_size", "hidden_size", "stage_names"):
            return value
        if name == "depths":
            return each(value, 1)
        if name == "image_size":
            return each(value, 2 * IMAGE)
    elif isinstance(value, (list, tuple)) and len(value) == num_layers(config) > LAYERS:
        return cut(value)
    if isinstance(value, (bool, str)) or value is None:
        return value
    for pattern, target in RULES:
        if re.fullmatch(pattern, name):
            return each(value, target)
    return value


def each(value: Any, target: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(each(v, target) for v in value)
    return type(value)(target) if isinstance(value, (int, float)) else value


def is_pyramid(config: PreTrainedConfig) -> bool:
    """Tell whether the model shrinks its image in stages, of which each field has a list."""
    return isinstance(vars(config).get("depths"), (list, tuple))


def num_layers(config: PreTrainedConfig) -> int:
    names = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "depth")
    return next((n for n in (vars(config).get(k) for k in names) if isinstance(n, int)), 0)


def cut(values: Any) -> Any:
    """Return two entries, of different kinds where there are any."""
    other = [v for v in values if v != values[0]]
    return type(values)([values[0], (other or values)[0]])


def token(name: str, value: Any, special: Any) -> Any:
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    if name in fixed:
        return fixed[name]
    return next(special) if isinstance(value, int) else value


def rope(parameters: Mapping[str, Any], has_sections: bool) -> dict[str, Any]:
    """Return the parameters with sections that add up to half of the head's rotated part."""
    if any(isinstance(v, Mapping) for v in parameters.values()):  # by type of layer
        return {
            k: rope(v, has_sections) if isinstance(v, Mapping) else v for k, v in parameters.items()
        }
    parameters = copy.deepcopy(dict(parameters))
    if parameters.get("rope_theta", 0) is None:
        parameters["rope_theta"] = 10_000.0
    if (has_sections and "rope_theta" in parameters) or "mrope_section" in parameters:
        half = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0)) // 2
        parameters["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return parameters
