# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""SDAR: Qwen3 whose attention is causal between blocks and goes both ways inside a block, without a shift: the logits
at position i predict the token at position i ("SDAR", https://arxiv.org/abs/2510.06303).

Module names are those of the official checkpoints, which are Qwen3's.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.utils.output_capturing import OutputRecorder

from .configuration_sdar import SDARConfig
from .generation_diffusion import DiffusionGenerationMixin
from .language_model import LanguageModelMixin
from .layers import BidirectionalPreTrainedModel, RMSNorm, RotaryTables, attention, prepare_attention
from .modeling_dream import DreamBaseModel, DreamDecoderLayer
from .packed_projections import project


class SDARAttention(nn.Module):
    packed_projections = (("q_proj", "k_proj", "v_proj"),)

    def __init__(self, config: SDARConfig, layer_idx: int):
        super().__init__()
        prepare_attention(self, config, layer_idx, config.head_dim)
        size, kv_size = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: RotaryTables,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = project(x, (self.q_proj, self.k_proj, self.v_proj))
        query = self.q_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        key = self.k_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        projected = query, key, value
        mixed, weights = attention(self, projected, position_embeddings, attention_mask, past_key_values, **kwargs)
        return self.o_proj(mixed), weights


class SDARDecoderLayer(DreamDecoderLayer):
    attention_class = SDARAttention


class SDARPreTrainedModel(BidirectionalPreTrainedModel):
    config_class = SDARConfig
    _no_split_modules = ["SDARDecoderLayer"]
    _can_record_outputs = {"hidden_states": SDARDecoderLayer, "attentions": OutputRecorder(SDARDecoderLayer, index=1)}


class SDARModel(SDARPreTrainedModel, DreamBaseModel):
    """The transformer from token ids to normed hidden states: Dream's with these layers."""

    layer_class = SDARDecoderLayer


class SDARForCausalLM(LanguageModelMixin, DiffusionGenerationMixin, SDARPreTrainedModel):
    """SDAR with its head and parallel `generate()`. The logits at position i predict the token at position i, or, with
    `config.logits_shift=1`, the token at i + 1."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        self.logits_shift = config.logits_shift
        self.model = SDARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


SDARForCausalLM.register_for_auto_class("AutoModelForCausalLM")
