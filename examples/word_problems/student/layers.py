# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""What the layers of all families are made of beside their projections. Each part takes its kernel where that suits
(`triton_kernels.py`), and else is plain PyTorch with the same rounding."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, create_bidirectional_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .block_cache import BlockCache, Tokens, added_mask
from .triton_kernels import (
    HEAD_DIMS,
    fused_attention,
    fused_rms_norm,
    fused_rotate,
    fused_silu_product,
    kernel_or_plain,
    suit_kernels,
)

# The attention of these models unless another is asked for: PyTorch's scaled dot products, and, where a pass computes
# parts of rows against a `BlockCache`, the kernel. `attn_implementation="sdpa"` is PyTorch alone.
BLOCK_SDPA = "block_sdpa"
FLEX_ATTENTION = (BLOCK_SDPA, "flex_attention")  # those that take a `BlockMask`
BLOCK_ATTENTION = (*FLEX_ATTENTION, "sdpa", "eager")  # those that take any mask of queries and keys


def block_sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """PyTorch's scaled dot products, or FlexAttention where the mask is one of that."""
    if attention_mask is None or isinstance(attention_mask, torch.Tensor):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Under autocast, norms leave queries and keys in float32, and FlexAttention wants one dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(BLOCK_SDPA, block_sdpa)
AttentionMaskInterface.register(BLOCK_SDPA, sdpa_mask)


class BidirectionalPreTrainedModel(PreTrainedModel):
    """What models of these layers can do."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # transformers reads the source of the model's file, and attention is called in this one

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or BLOCK_SDPA, is_init_check)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        # `fully_shard` lays a class of PyTorch's over the model's, and transformers would save that one's code.
        kind = type(self)
        self.__class__ = next(each for each in kind.__mro__ if not each.__module__.startswith("torch.distributed."))
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = kind


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of `x`; with a residual, the sum of the two and the norm of that."""
        return kernel_or_plain(
            suit_kernels(x, self.weight), fused_rms_norm, rms_norm, x, self.weight, self.eps, residual
        )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """weight * x / sqrt(mean(x²) + eps), over the last dimension. With a residual of the same shape: the sum of the
    two, and the norm of that."""
    if residual is not None:
        total = residual + x
        return total, rms_norm(total, weight, eps)
    return weight * nn.functional.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def diffusion_mask(
    config: PreTrainedConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    past_key_values: Cache | None = None,
) -> Any:
    """What the attention implementation of `config` takes for what each position may attend to.

    Args:
        config (`PreTrainedConfig`): of the model; its `block_causal_length` decides the pattern.
        hidden_states (`torch.Tensor` of shape `(B, Q, D)`): input of the first layer.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at keys that nothing may attend to. None if
            there are none: a mask is not searched for zeros, since that would be a wait for the device in every pass.
            Or, bool of shape `(B or 1, 1, Q, T)`, which queries may attend to which keys, or a `BlockMask` of
            FlexAttention: then nothing else is looked at, neither blocks nor padding.
        position_ids (`torch.Tensor` of shape `(B, Q)` or `(1, Q)`): from the first token of each row.
        past_key_values (`Cache`, *optional*): tells how many keys there are. A `BlockCache` knows itself what is seen.
    """
    if isinstance(past_key_values, BlockCache):
        return None
    length, implementation, in_blocks = config.block_causal_length, config._attn_implementation, None
    is_sdpa = implementation in ("sdpa", BLOCK_SDPA)
    if attention_mask is not None and getattr(attention_mask, "ndim", None) != 2:
        return ready_mask(attention_mask, hidden_states, implementation)
    if length is not None:
        if past_key_values is not None or implementation not in BLOCK_ATTENTION:
            raise ValueError(
                f"`attn_implementation={implementation!r}` or `past_key_values` of this kind cannot attend by blocks: "
                f"the one must be {BLOCK_SDPA!r}, 'sdpa', 'eager' or 'flex_attention', the other None."
            )
        blocks = (position_ids // length).expand(len(hidden_states), -1)

        def in_blocks(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            return blocks[batch, query] >= blocks[batch, key]

    if attention_mask is None and in_blocks is None:
        return None
    # transformers is renaming `past_key_values`: where it is handed on, it goes by its place.
    mask = create_bidirectional_mask(
        config, hidden_states, attention_mask, None, past_key_values, and_mask_function=in_blocks,
        allow_is_bidirectional_skip=False,
    )  # fmt: skip
    if is_sdpa and mask.ndim == 4 and mask.dtype == torch.bool:
        # Each layer would make this of a bool mask. Without blocks, it is the same for all queries.
        is_hidden, dtype = ~mask[:, :, :1] if in_blocks is None else ~mask, hidden_states.dtype
        mask = added_mask(is_hidden, dtype).expand(-1, -1, hidden_states.shape[1], -1)
    return mask


def ready_mask(attention_mask: Any, hidden_states: torch.Tensor, implementation: str) -> Any:
    """A mask of queries and keys, as `diffusion_mask` takes it, for an attention implementation."""
    is_tensor = isinstance(attention_mask, torch.Tensor)
    takers = BLOCK_ATTENTION if is_tensor else FLEX_ATTENTION
    if implementation not in takers:
        raise ValueError(
            f"`attn_implementation={implementation!r}` cannot attend by blocks, or as this `attention_mask` says: it "
            f"must be one of {', '.join(map(repr, takers))}."
        )
    if not is_tensor or attention_mask.dtype != torch.bool:
        return attention_mask
    mask = added_mask(~attention_mask, hidden_states.dtype)
    return mask.expand(len(hidden_states), -1, -1, -1) if implementation == "flex_attention" else mask


class RotaryTables:
    """Cosine and sine of the rotary angles, float32, each (B or 1, 1, T, head_dim / 2).

    An object and no pair, as FSDP casts the tensors among a layer's arguments to the dtype that it computes in, which
    is too coarse for angles. What moves arguments between devices calls `to`.
    """

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor):
        self.cos, self.sin = cos, sin

    def to(self, *args: Any, **kwargs: Any) -> "RotaryTables":
        return RotaryTables(self.cos.to(*args, **kwargs), self.sin.to(*args, **kwargs))


def prepare_attention(
    module: nn.Module, config: PreTrainedConfig, layer_idx: int, head_dim: int | None = None
) -> None:
    """Give a module what `attention` and transformers' attention functions read of it."""
    module.config = config
    module.layer_idx = layer_idx
    module.head_dim = head_dim or config.hidden_size // config.num_attention_heads
    module.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    module.is_causal = False


def attention(
    module: nn.Module,
    projected: Sequence[torch.Tensor],
    tables: RotaryTables,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a layer from its projections, queries, keys and values, each (B, Q, heads * head_dim), and the
    `RotaryTables`. Returns what is to be projected back, and the weights if the implementation knows them."""
    query, key, value = (each.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for each in projected)
    if isinstance(past_key_values, BlockCache):
        return cached_attention(module, query, key, value, tables, past_key_values).flatten(2), None
    query, key = rotate(query, key, tables.cos, tables.sin)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, plain_attention)
    scaling = module.head_dim**-0.5
    mixed, weights = function(module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs)
    return mixed.flatten(2), weights


def cached_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: RotaryTables,
    cache: BlockCache,
) -> torch.Tensor:
    """Attention of the tokens of a pass, (1, heads, N, head_dim), each to what its own row sees of the cache, where
    their keys and values are put first. Returns (1, N, heads, head_dim)."""
    kept, tokens = cache.of_layer(module.layer_idx, key), cache.tokens
    suits = query.shape[3] in HEAD_DIMS and suit_kernels(query, key, value)
    query = kernel_or_plain(
        suits, fused_rotate, rotate_and_keep, query, key, tables.cos, tables.sin, value, kept, tokens
    )
    suits = suits and module.config._attn_implementation == BLOCK_SDPA and query.dtype.itemsize == 2
    attend, scaling = partial(padded_attention, module), module.head_dim**-0.5
    return kernel_or_plain(suits, fused_attention, attend, query, *kept, tokens, scaling)


def rotate_and_keep(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    value: torch.Tensor,
    kept: Sequence[torch.Tensor],
    tokens: Tokens,
) -> torch.Tensor:
    """Rotary embedding of queries, which are returned, and of keys, which go with the values into what is kept."""
    query, key = rotate(query, key, cos, sin)
    tokens.keep(kept, (key, value))
    return query


def padded_attention(
    module: nn.Module, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tokens: Tokens, scaling: float
) -> torch.Tensor:
    """What the kernel does, with a row of the pass a row of a batch, as PyTorch's attention wants it."""
    function = plain_attention if module.config._attn_implementation == "eager" else sdpa_attention_forward
    keys, values = tokens.rows_of((keys, values))
    mask = tokens.mask(query.dtype, query.device)
    return tokens.unpad(function(module, tokens.pad(query), keys, values, mask, dropout=0.0, scaling=scaling)[0])


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for `attn_implementation="eager"`."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Sequence[torch.Tensor]:
    """Rotary embedding of queries and keys (B, heads, T, head_dim), in float32, by tables (B or 1, 1, T,
    head_dim / 2)."""
    suits = query.shape[3] in HEAD_DIMS and suit_kernels(query, key)
    return kernel_or_plain(suits, fused_rotate, plain_rotate, query, key, cos, sin)


def plain_rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> Sequence[torch.Tensor]:
    rotated = []
    for x in (query, key):
        first, second = x.float().chunk(2, dim=-1)
        rotated.append(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype))
    return rotated


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return kernel_or_plain(suit_kernels(gate, up), fused_silu_product, plain_silu_product, gate, up)


def plain_silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate) * up


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """What a model applies its head to: of hidden states (B, T, D) those that `logits_to_keep` names: all (0), the
    last n (n), the same positions of each row (L,), or others of each row (B, L)."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    positions = logits_to_keep.to(hidden_states.device)
    if positions.ndim == 1:
        return hidden_states[:, positions]
    return hidden_states.take_along_dim(positions[..., None], dim=1)
