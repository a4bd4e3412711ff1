# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Configuration of the Dream family (Dream-org/Dream-v0-Base-7B, -Instruct-7B, Dream-Coder and models distilled from
them): Qwen2's, with `[MASK]`, in the official files' own keys."""

from typing import Any

from transformers import Qwen2Config


class DreamConfig(Qwen2Config):
    """Shape of a Dream model. The defaults are those of Dream-7B.

    Args:
        vocab_size (`int`, defaults to 152064): number of token ids.
        hidden_size (`int`, defaults to 3584): width; a multiple of `num_attention_heads`.
        intermediate_size (`int`, defaults to 18944): inner width of the gated MLP.
        num_hidden_layers (`int`, defaults to 28): number of blocks.
        num_attention_heads (`int`, defaults to 28): query heads.
        num_key_value_heads (`int`, defaults to 4): key/value heads, a divisor of `num_attention_heads`.
        max_position_embeddings (`int`, defaults to 131072): longest prompt and answer together, in tokens.
        rope_theta (`float`, defaults to 1000000.0): base wavelength of the rotary embedding; in the file only, as it
            becomes a part of transformers' `rope_parameters`.
        rope_scaling (`dict`, *optional*): as in transformers; likewise.
        tie_word_embeddings (`bool`, defaults to `False`): the head shares the embedding's weight.
        mask_token_id (`int`, defaults to 151666): id of `[MASK]`.
        eos_token_id, bos_token_id, pad_token_id (`int`, default to 151643): end-of-text, which is also padding.
        use_cache (`bool`, defaults to `False`): kept for other readers; decoding sets its own cache.
        block_causal_length (`int`, *optional*): attention is causal between blocks of so many tokens, see `forward`.
        kwargs: the other fields of `Qwen2Config`.

    Raises:
        ValueError: for heads that do not divide, or for what no Dream model has: attention in a sliding window,
            dropout, another activation.
    """

    model_type = "Dream"
    default_theta = 1_000_000.0

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 131072
    use_cache: bool = False
    mask_token_id: int = 151666
    eos_token_id: int | list[int] | None = 151643
    bos_token_id: int | None = 151643
    pad_token_id: int | None = 151643
    block_causal_length: int | None = None

    def __post_init__(self, **kwargs):
        if self.use_sliding_window:
            raise ValueError("`use_sliding_window=True` is not supported: every Dream model has `False`.")
        for name, value in (("hidden_act", "silu"), ("attention_dropout", 0.0)):
            if getattr(self, name) != value:
                given = getattr(self, name)
                raise ValueError(f"`{name}={given!r}` is not supported: every Dream model has `{value!r}`.")
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        for name, divisor in (("hidden_size", self.num_attention_heads), ("num_attention_heads", kv_heads)):
            if getattr(self, name) % divisor:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` must be a multiple of the number of heads, {divisor}."
                )
        if type(self) is DreamConfig:
            # All of it at once: `save_pretrained` alone would only write the entry of the class that is being saved.
            kwargs["auto_map"] = {
                "AutoConfig": "configuration_dream.DreamConfig",
                "AutoModel": "modeling_dream.DreamModel",
                "AutoModelForCausalLM": "modeling_dream.DreamModel",
            }
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, with the rotary settings under the names of the official files."""
        fields = with_official_rotary(super().to_dict(), self.default_theta)
        if self.block_causal_length is None:  # as in the official files
            del fields["block_causal_length"]
        return fields


def with_official_rotary(fields: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """Fields of a configuration with `rope_theta` and `rope_scaling` in place of transformers' `rope_parameters`."""
    rotary = dict(fields.pop("rope_parameters", None) or {})
    fields["rope_theta"] = rotary.pop("rope_theta", default_theta)
    fields["rope_scaling"] = rotary if rotary.get("rope_type", "default") != "default" else None
    del fields["layer_types"]
    return fields


DreamConfig.register_for_auto_class()
