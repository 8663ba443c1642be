"""Keys of config.json that may be set although no reader of a family follows them.

Every other key is refused, see `jdpo.models.families.recorded_config`. A key belongs here only if transformers' own
class of the family computes the same results for every accepted value, which its modeling file shows.
"""

from __future__ import annotations

from typing import Any

Values = tuple[Any, ...]

OFF: Values = (None, False, 0, "", [], {})
"""Values that turn off a setting that is not in the tables."""

CHANGE_NOTHING: frozenset[str] = frozenset(
    {
        # About the file.
        *("architectures", "auto_map", "configuration_files", "custom_pipelines", "dtype", "license"),
        *("model_name", "name", "revision", "tags", "torch_dtype", "transformers.js_config", "transformers_version"),
        *("unsloth_fixed", "unsloth_version"),
        "ignore_keys_at_rope_validation",  # written by transformers' own classes
        # About the tokenizer.
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
        *("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length", "padding_side", "tokenizer_class"),
        "vocab_file",
        # Lengths under names of training programs; max_position_embeddings is read.
        *("max_seq_len", "max_seq_length", "max_sequence_length", "seq_length"),
        # What a forward pass returns, apart from logits.
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache"),
        *("num_logits_to_keep", "tie_last_hidden_states"),
        # Other ways to compute the same values.
        *("attention_softmax_in_fp32", "cache_implementation", "chunk_size_feed_forward", "flash_attn"),
        *("gradient_checkpointing", "pretraining_tp", "reorder_and_upcast_attn", "scale_attention_softmax_in_fp32"),
        *("use_flash_attention", "use_flash_attn", "attn_implementation"),
        # Random weights to start from.
        *("initializer_range", "init_std", "mup_init", "initializer_factor"),
        # Dropout, which preference training does not use.
        *("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout", "dropout"),
        *("embd_pdrop", "embedding_dropout", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop"),
        "residual_dropout",
        # Heads of classifiers; reward models have one label and no other setting, see `read_reward_config`.
        *("finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
        # `is_decoder` adds a causal mask to encoders; the families here are causal without it.
        "is_decoder",
    }
)
"""Keys that change no forward pass in any family, whatever their value."""

MEAN_NOTHING: dict[str, Values] = {
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "embedding_scale": (None, 1),
    "factor": (None, 1),  # these six of rope_parameters
    "attention_factor": (None, 1),
    "mscale": (None, 1),
    "mscale_all_dim": (None, 0, 1),
    "long_mscale": (None, 1),
    "short_mscale": (None, 1),
    "interpolate_factor": (None, 1),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "residual_multiplier": (None, 1),
    "routed_scaling_factor": (None, 1),
    "scale_attn_weights": (None, True),
    "use_rope": (None, True),
}
"""Values that mean nothing, of keys for which they are not those of `OFF`, or not all of these."""

OF_ROPES: frozenset[str] = frozenset(
    {
        "rope_type",
        "type",  # the old name of rope_type
        "rope_theta",
        # Lengths select no formula by themselves: rope types that have one read it.
        *("original_max_position_embeddings", "max_position_embeddings", "finetuned"),
        # In a row without images a token has one position in all sections, which makes the rope a plain one.
        *("mrope_section", "mrope_interleaved"),
        "long_factor",  # for sequences above the original length, which are refused
        # Ropes of types that no layer has.
        *("full_attention", "sliding_attention"),
    }
)
"""Keys of rope_parameters that may be set although the rope's type does not read them."""

# Settings of images and of the tensors around the text part, which no row reaches; the tie is set in text_config.
_OF_IMAGES: dict[str, Values | None] = dict.fromkeys(
    (
        *("boi_token_index", "eoi_token_index", "image_token_id", "image_token_index", "mm_tokens_per_image"),
        *("multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "tie_word_embeddings"),
        *("video_token_id", "vision_config", "vision_end_token_id", "vision_feature_layer", "vision_start_token_id"),
        "vision_token_id",
    )
)

_OF_DELTA: dict[str, Values | None] = {
    # Read if a layer has a gated DeltaNet.
    **dict.fromkeys(
        (
            *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
            "linear_conv_kernel_dim",
        )
    ),
    "full_attention_interval": None,  # transformers' classes turn it into layer_types
    "mamba_ssm_dtype": ("float32",),  # of the states, as here
    "output_gate_type": ("silu", "swish"),  # of the output of a DeltaNet, which is multiplied by SiLU of a gate
    # Of tensors that predict further tokens, which are carried and not trained.
    **dict.fromkeys(("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "num_nextn_predict_layers")),
}
# Read if a layer has experts.
_OF_EXPERTS: dict[str, Values | None] = dict.fromkeys(
    (
        *(
            "moe_intermediate_size",
            "norm_topk_prob",
            "num_experts_per_tok",
            "num_local_experts",
            "router_aux_loss_coef",
        ),
        "shared_expert_intermediate_size",
    )
)

# transformers' classes always normalize the weights of a token's experts; to them the key is unknown.
_NORMALIZED: dict[str, Values | None] = {"norm_topk_prob": (None, True)}

OF_FAMILY: dict[str, dict[str, Values | None]] = {
    "apertus": {"qk_norm": (True,)},
    # Names of settings of the class that trained it, with the only values that transformers' class computes.
    "cohere2": {
        "sliding_window_pattern": None,  # turned into layer_types, which is read
        "layer_switch": (4,),
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1,),
        **dict.fromkeys(("use_embedding_sharing", "use_gated_activation", "use_parallel_block"), (True,)),
        "use_parallel_embedding": None,  # how that program split its table over devices
    },
    "ernie4_5": {"compression_ratio": (1,), "use_rmsnorm": (True,)},
    "gemma3": _OF_IMAGES,
    "mistral3": _OF_IMAGES,
    "qwen2_5_vl": _OF_IMAGES,
    "qwen2_5_vl_text": {"max_window_layers": None},
    "qwen3_5": _OF_IMAGES,
    "qwen3_5_moe": _OF_IMAGES,
    "qwen3_vl": _OF_IMAGES,
    "qwen3_next": {**_OF_DELTA, **_OF_EXPERTS},
    "qwen3_5_text": _OF_DELTA,
    # No layer has an MLP besides its experts.
    "qwen3_5_moe_text": {**_OF_DELTA, "intermediate_size": None, **_NORMALIZED},
    # transformers' classes turn these into layer_types or a window, which is read.
    "gemma3_text": {"sliding_window_pattern": None},
    "qwen2": {"max_window_layers": None, "use_mrope": (False,)},
    "qwen3": {"max_window_layers": None, "use_qk_norm": (True,)},
    "smollm3": {"no_rope_layer_interval": None, "max_window_layers": None},
    "mixtral": _NORMALIZED,
    # Names of the publisher's own program for num_experts_per_tok and for the original length of the rope.
    "gpt_oss": {**_NORMALIZED, "experts_per_token": None, "initial_context_length": None},
    "gpt2": {"n_ctx": None},  # an old name of n_positions
    # SmolLM2: pairs of a rope that are not interleaved, as in every Llama.
    "llama": {"is_llama_config": (True,), "rope_interleaved": (False,)},
    # Moved into rope_parameters, where it is read.
    "phi3": {"original_max_position_embeddings": None, "partial_rotary_factor": None, "full_attn_mod": (1,)},
    "qwen3_moe": {
        "max_window_layers": None,  # of the dense family; with a window, all layers of this one have it
        "use_qk_norm": (True,),
        "num_local_experts": None,  # num_experts under the name that some versions of transformers write
        **_OF_EXPERTS,
    },
    # Names of settings of the class that trained it; transformers reads hidden_act, norm_epsilon and use_bias.
    "starcoder2": {
        "activation_function": None,
        "layer_norm_epsilon": None,
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
    },
}
"""Keys of single families: with the accepted values, or with None if every value is."""
