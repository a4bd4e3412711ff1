# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Configuration of the SDAR family (JetLM/SDAR-1.7B-Chat, -4B, -8B, those of other block lengths, and models made from
them, such as TraDo): Qwen3's, with `[MASK]` and the length of a block, in the official files' own keys."""

from typing import Any

from transformers import Qwen3Config

from .configuration_dream import with_official_rotary


class SDARConfig(Qwen3Config):
    """Shape of an SDAR model. The defaults are those of SDAR-8B-Chat.

    Some official files have neither `block_size` nor `mask_token_id`: then the block length is 4, as in `SDAR-*-Chat`,
    and has to be given for `SDAR-*-Chat-b16` and its like: `from_pretrained(..., block_size=16)`.

    Args:
        vocab_size (`int`, defaults to 151936): number of token ids.
        hidden_size (`int`, defaults to 4096): width.
        intermediate_size (`int`, defaults to 12288): inner width of the gated MLP.
        num_hidden_layers (`int`, defaults to 36): number of blocks.
        num_attention_heads (`int`, defaults to 32): query heads.
        num_key_value_heads (`int`, defaults to 8): key/value heads, a divisor of `num_attention_heads`.
        head_dim (`int`, defaults to 128): of each head.
        max_position_embeddings (`int`, defaults to 32768): longest prompt and answer together, in tokens.
        rope_theta (`float`, defaults to 1000000.0), rope_scaling (`dict`, *optional*): as in `DreamConfig`.
        block_size (`int`, defaults to 4): attention is causal between blocks of so many tokens, see `forward`. Alias
            `block_causal_length`, as the other families have it.
        mask_token_id (`int`, defaults to 151669): id of `[MASK]`.
        logits_shift (`int`, defaults to 0): 1 in models that were made of an autoregressive one, where the logits at
            i - 1 predict the token at i; no official file has it.
        kwargs: the other fields of `Qwen3Config`, and those of the official training code, which are kept.

    Raises:
        ValueError: for heads that do not divide, a block length below 1, a shift other than 0 or 1, or for what no
            SDAR model has: attention in a sliding window, biases, dropout, another activation.
    """

    model_type = "sdar"
    default_theta = 1_000_000.0
    attribute_map = {"block_causal_length": "block_size"}

    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_key_value_heads: int | None = 8
    block_size: int | None = 4
    mask_token_id: int = 151669
    logits_shift: int = 0
    eos_token_id: int | list[int] | None = 151643
    bos_token_id: int | None = 151643
    pad_token_id: int | None = 151643

    def __post_init__(self, **kwargs):
        kwargs.pop("attn_implementation", None)  # of the official files: what their training took
        if "block_causal_length" in kwargs:
            self.block_size = kwargs.pop("block_causal_length")
        self.rope_parameters = self.rope_parameters or {
            "rope_type": "default", "rope_theta": kwargs.get("rope_theta") or self.default_theta,
        }  # fmt: skip
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"`block_size={self.block_size!r}` is not allowed: it must be an integer of at least 1.")
        if self.logits_shift not in (0, 1):
            raise ValueError(f"`logits_shift={self.logits_shift!r}` is not allowed: it must be 0 or 1.")
        fixed = {"use_sliding_window": False, "attention_bias": False, "hidden_act": "silu", "attention_dropout": 0.0}
        for name, value in fixed.items():
            if (given := getattr(self, name)) != value:
                raise ValueError(f"`{name}={given!r}` is not supported: every SDAR model has `{value!r}`.")
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        if self.num_attention_heads % kv_heads:
            raise ValueError(
                f"`num_attention_heads={self.num_attention_heads}` must be a multiple of {kv_heads} key/value heads."
            )
        if type(self) is SDARConfig:
            # All of it at once: `save_pretrained` alone would only write the entry of the class that is being saved.
            kwargs["auto_map"] = {
                "AutoConfig": "configuration_sdar.SDARConfig",
                "AutoModel": "modeling_sdar.SDARForCausalLM",
                "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
            }
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, with the rotary settings under the names of the official files."""
        fields = with_official_rotary(super().to_dict(), self.default_theta)
        if self.logits_shift == 0:  # as in the official files
            del fields["logits_shift"]
        return fields


SDARConfig.register_for_auto_class()
