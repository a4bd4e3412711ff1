# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Configuration of the LLaDA family (GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5 and models distilled from them).

The fields bear the names of the official `config.json`, so that official files load unchanged and files written here
are read by the official code and by serving engines. transformers' own names (`hidden_size`, ...) are aliases, also in
`to_dict()`, where peft and others look for them; files hold the official names alone.
"""

from typing import Any

from transformers import PreTrainedConfig

# The official configuration class describes many models that were never trained. These keys have one value in the
# whole family; they are kept in the file for other readers, and any other value is refused.
FIXED_VALUES = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}


class LLaDAConfig(PreTrainedConfig):
    """Shape of a LLaDA model. The defaults are those of LLaDA-8B.

    Args:
        d_model (`int`, defaults to 4096): width; a multiple of `n_heads`. Alias `hidden_size`.
        n_layers (`int`, defaults to 32): number of blocks. Alias `num_hidden_layers`.
        n_heads (`int`, defaults to 32): query heads. Alias `num_attention_heads`.
        n_kv_heads (`int`, *optional*): key/value heads, a divisor of `n_heads`; all of them if unset. Alias
            `num_key_value_heads`.
        mlp_hidden_size (`int` or None, defaults to 12288): inner width of the gated MLP; `mlp_ratio * d_model` if
            None. Alias `intermediate_size`.
        mlp_ratio (`int`, defaults to 4): see `mlp_hidden_size`.
        vocab_size (`int`, defaults to 126464): number of token ids.
        embedding_size (`int`, *optional*): rows of the embedding and of the head, at least `vocab_size`; equal to it
            if unset.
        max_sequence_length (`int`, defaults to 4096): longest prompt and answer together, in tokens. Alias
            `max_position_embeddings`.
        rope_theta (`float`, defaults to 500000.0): base wavelength of the rotary embedding.
        rms_norm_eps (`float`, defaults to 1e-5): added to the mean square in the norms.
        weight_tying (`bool`, defaults to `False`): the head shares the embedding's weight. Alias
            `tie_word_embeddings`.
        init_std (`float`, defaults to 0.02): standard deviation of new weights. Alias `initializer_range`.
        mask_token_id (`int`, defaults to 126336): id of `[MASK]`.
        eos_token_id (`int` or list of `int`, defaults to 126081): end-of-text.
        pad_token_id (`int`, defaults to 126081): padding.
        use_cache (`bool`, defaults to `False`): kept for other readers; decoding sets its own cache.
        block_causal_length (`int`, *optional*): attention is causal between blocks of so many tokens, see `forward`.

    Raises:
        ValueError: for a shape that does not divide, or a value that no LLaDA model has (`FIXED_VALUES`).
    """

    model_type = "llada"
    keys_to_ignore_at_inference = ["past_key_values"]
    # By the names of modules below `LLaDAModel`: each device has a part of the heads and of the MLP's inner width.
    base_model_tp_plan = {
        "transformer.blocks.*.q_proj": "colwise",
        "transformer.blocks.*.k_proj": "colwise",
        "transformer.blocks.*.v_proj": "colwise",
        "transformer.blocks.*.attn_out": "rowwise",
        "transformer.blocks.*.ff_proj": "colwise",
        "transformer.blocks.*.up_proj": "colwise",
        "transformer.blocks.*.ff_out": "rowwise",
    }
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
    }

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = 12288
    mlp_ratio: int = 4
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    init_std: float = 0.02
    mask_token_id: int = 126336
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    use_cache: bool = False
    block_causal_length: int | None = None

    def __post_init__(self, **kwargs):
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        for key, value in FIXED_VALUES.items():
            given = kwargs.pop(key, value)
            # The official files write an unset switch as null as well as false.
            if given != value and not (given is None and value is False) and not (given is False and value is None):
                raise ValueError(f"`{key}={given!r}` is not supported: every LLaDA model has `{key}={value!r}`.")
            setattr(self, key, value)
        for key in ("rope_scaling", "rope_parameters"):
            if (given := kwargs.pop(key, None)) is not None:
                raise ValueError(f"`{key}={given!r}` is not supported: LLaDA has one `rope_theta` and no scaling.")
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(f"`d_model={self.d_model}` must be an even multiple of `n_heads={self.n_heads}`.")
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"`embedding_size={self.embedding_size}` must be at least `vocab_size={self.vocab_size}`."
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"`n_kv_heads={self.n_kv_heads}` must divide `n_heads={self.n_heads}`.")
        if type(self) is LLaDAConfig:
            # All of it at once: `save_pretrained` alone would only write the entry of the class that is being saved.
            kwargs["auto_map"] = {
                "AutoConfig": "configuration_llada.LLaDAConfig",
                "AutoModel": "modeling_llada.LLaDAModelLM",
                "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            }
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **{alias: getattr(self, alias) for alias in self.attribute_map}}

    def to_diff_dict(self) -> dict[str, Any]:
        """What files hold."""
        fields = {name: value for name, value in super().to_diff_dict().items() if name not in self.attribute_map}
        if self.block_causal_length is None:  # as in the official files
            fields.pop("block_causal_length", None)
        return fields


LLaDAConfig.register_for_auto_class()
