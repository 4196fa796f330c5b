"""What the rules of `configs.py` do not know: fields of one model type, by its `model_type`."""

from typing import Any

SPEECH = {
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "tdnn_dim": (16, 16),
    "tdnn_kernel": (3, 1),
    "tdnn_dilation": (1, 1),
    "xvector_output_dim": 16,
    "num_codevectors_per_group": 8,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "num_negatives": 4,
    "classifier_proj_size": 16,
    "vocab_size": 64,
}
TDNN = {k: SPEECH[k] for k in ("tdnn_dim", "tdnn_kernel", "tdnn_dilation", "xvector_output_dim")}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
PERCEIVER = {
    "num_latents": 8,
    "d_latents": 32,
    "d_model": 32,
    "num_blocks": 1,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
}
FORECAST = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
    "input_size": 1,
    "feature_size": 5,
}
EFFICIENTNET = {
    "hidden_dim": 320,
    "width_coefficient": 0.25,
    "depth_coefficient": 0.1,
    "depth_divisor": 4,
}


def resnet(*stages: str) -> dict[str, Any]:
    return {
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "out_features": list(stages),
        },
        "use_timm_backbone": False,
        "backbone": None,
        "backbone_kwargs": None,
        "use_pretrained_backbone": False,
    }


ALL_STAGES = ("stage2", "stage3", "stage4")
HGNET = {
    "stem_channels": (3, 8, 8),
    "hidden_sizes": (16, 16, 16, 16),
    "stage_in_channels": (8, 16, 16, 16),
    "stage_mid_channels": (8, 8, 8, 8),
    "stage_out_channels": (16, 16, 16, 16),
    "stage_num_blocks": (1, 1, 1, 1),
    "stage_numb_of_layers": (1, 1, 1, 1),
}
EIGHT = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}  # of DetrForSegmentation
RT_DETR = {
    "backbone_config": resnet(*ALL_STAGES)["backbone_config"],
    "encoder_in_channels": (8, 16, 16),
    "decoder_in_channels": (32, 32, 32),
    "num_denoising": 0,  # it draws boxes
    "num_queries": 5,
}
FOUR_LAYERS = {"num_hidden_layers": 4}  # one for each feature of a segmentation head

# Types that share their fields, between spaces.
SHARED: dict[str, dict[str, Any]] = {
    "data2vec-audio hubert sew sew-d speecht5 unispeech unispeech-sat wavlm": SPEECH,
    "wav2vec2 wav2vec2-conformer": SPEECH,
    "ministral hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hunyuan_vl_text": {"head_dim": 16},
    "bamba granitemoehybrid": SSM,
    "flaubert xlm": {"emb_dim": 32},
    "gptj codegen": {"rotary_dim": 8, "n_head": 4},
    "informer autoformer time_series_transformer": FORECAST,
    "swin swinv2 donut-swin maskformer-swin": {"window_size": 2},
    "longformer led": {"attention_window": 8},
    "detr conditional_detr table-transformer": resnet("stage1", *ALL_STAGES) | EIGHT,
    "dab-detr": resnet(*ALL_STAGES),
    "efficientnet align_vision_model": EFFICIENTNET,
    "rt_detr rt_detr_v2 d_fine deimv2": RT_DETR,
}
OWN: dict[str, dict[str, Any]] = {
    "deformable_detr": resnet(*ALL_STAGES) | {"num_feature_levels": 3},
    "falcon_h1": SSM | {"mamba_d_ssm": 64},
    "wav2vec2-bert": TDNN | {"vocab_size": 64, "feature_projection_input_dim": 16},
    "perceiver": PERCEIVER,
    "xmod": {"default_language": "en_XX"},
    "nemotron": {"num_key_value_heads": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 24},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ("local", "lsh"),
        "hash_seed": 0,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
    "levit": {
        "hidden_sizes": (16, 32, 48),
        "num_attention_heads": (2, 2, 2),
        "key_dim": (8, 8, 8),
        "depths": (1, 1, 1),
        "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
    },
    "hgnet_v2": HGNET,
    "textnet": {"hidden_sizes": (8, 8, 8, 8, 8), "stem_out_channels": 8, "image_size": 64},
    "bit": {"num_groups": 2},
    "cvt": {"depth": (1, 2, 3)},
    "esm": {"vocab_size": 64, "mask_token_id": 41, "pad_token_id": 0},
    "xlnet": {"d_head": 16},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "visual_embed": False, "input_size": 32},
    "lilt": {"hidden_size": 24},
    "funnel": {"d_head": 16, "block_sizes": (1, 1, 1)},
    "bridgetower": {"hidden_size": 64},
    "bridgetower_text_model": {"hidden_size": 64},
    "bridgetower_vision_model": {"hidden_size": 64},
    "mistral4": {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32, "head_dim": 32},
    "bros": {
        "dim_bbox_sinusoid_emb_2d": 48,
        "dim_bbox_sinusoid_emb_1d": 6,
        "dim_bbox_projection": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
        "mamba_headdim": 8,
        "chunk_size": 8,
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "beit": FOUR_LAYERS | {"use_mask_token": True, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": FOUR_LAYERS | {"out_indices": [1, 2, 3, 4]},
    "dpt": FOUR_LAYERS | {"backbone_out_indices": [0, 1, 2, 3]},
    "deit": {"encoder_stride": 8},
    "vit": {"encoder_stride": 8},
    "mobilenet_v1": {"image_size": 64, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": 64, "depth_multiplier": 0.25},
    "mobilevit": {"image_size": 64, "patch_size": 2},
    "mobilevitv2": {"image_size": 64, "patch_size": 2, "width_multiplier": 0.25},
    "granite_speech5_encoder": {"input_dim": 16},
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 32},
    "seamless_m4t": {"feature_projection_input_dim": 16},
    "seamless_m4t_v2": {"feature_projection_input_dim": 16},
    "clipseg": {"extract_layers": (0, 1)},
    "mask2former": {"feature_size": 32, "mask_feature_size": 32, "num_queries": 5},
    "vilt": {"num_images": 2, "modality_type_vocab_size": 3},
    "chameleon": {"vocabulary_map": {"<image>": 41, "IMGIMGA": 42}},
    "emu3": {"vocabulary_map": {"<image>": 41, "<|visual token 000001|>": 42}},
    "patchtst": {"num_targets": 3},
    "videomae": {"num_frames": 4},
    "paddleocr_vl_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [4, 2, 2],
        }
    },
    "tapas": {"type_vocab_sizes": (3, 8, 8, 2, 8, 8, 10), "max_num_rows": 8, "max_num_columns": 8},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 43},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 43},
}
OVERRIDES = {name: given for names, given in SHARED.items() for name in names.split()} | OWN
