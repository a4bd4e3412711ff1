# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Dream: Qwen2 without the causal mask. The logits at position i - 1 predict the token at position i, as in the
autoregressive model that Dream was trained from ("Dream 7B", https://arxiv.org/abs/2508.15487).

Module names are those of the official checkpoints, which are Qwen2's.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.utils.output_capturing import OutputRecorder

from .configuration_dream import DreamConfig
from .generation_dream import DreamGenerationMixin
from .language_model import LanguageModelMixin, TransformerMixin
from .layers import (
    BidirectionalPreTrainedModel,
    RMSNorm,
    RotaryTables,
    attention,
    prepare_attention,
    silu_product,
)
from .packed_projections import project


class DreamRotaryEmbedding(Qwen2RotaryEmbedding):
    """Qwen2's, whose frequencies stay in float32 when the model is cast: rounded, they misplace far positions."""

    def _apply(self, fn, recurse=True):
        names = ("inv_freq", "original_inv_freq")
        before = [getattr(self, name) for name in names]
        super()._apply(fn, recurse)
        for name, frequencies in zip(names, before, strict=True):
            if not frequencies.is_meta:
                setattr(self, name, frequencies.to(getattr(self, name).device))
        return self


class DreamAttention(nn.Module):
    packed_projections = (("q_proj", "k_proj", "v_proj"),)

    def __init__(self, config: DreamConfig, layer_idx: int):
        super().__init__()
        prepare_attention(self, config, layer_idx)
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=True)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: RotaryTables,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        projected = project(x, (self.q_proj, self.k_proj, self.v_proj))
        mixed, weights = attention(self, projected, position_embeddings, attention_mask, past_key_values, **kwargs)
        return self.o_proj(mixed), weights


class DreamMLP(nn.Module):
    packed_projections = (("gate_proj", "up_proj"),)

    def __init__(self, config: DreamConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_product(*project(x, (self.gate_proj, self.up_proj))))


class DreamDecoderLayer(GradientCheckpointingLayer):
    attention_class: type[nn.Module] = DreamAttention

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = DreamMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: RotaryTables,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_states, x = self.post_attention_layernorm(attended, residual=hidden_states)
        return hidden_states + self.mlp(x), weights


class DreamPreTrainedModel(BidirectionalPreTrainedModel):
    config_class = DreamConfig
    _no_split_modules = ["DreamDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": DreamDecoderLayer,
        "attentions": OutputRecorder(DreamDecoderLayer, index=1),
    }


class DreamBaseModel(TransformerMixin, DreamPreTrainedModel):
    """The transformer from token ids to normed hidden states."""

    layer_class: type[nn.Module] = DreamDecoderLayer

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        # Padding is end-of-text, whose embedding is learned like any other: no `padding_idx`.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DreamRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def parts(self) -> tuple[Iterable[nn.Module], nn.Module]:
        return self.layers, self.norm

    def rotary_tables(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> RotaryTables:
        # In float32 whatever the dtype of the model, and of two equal halves the first.
        tables = self.rotary_emb(hidden_states.float(), position_ids)
        return RotaryTables(*(table.chunk(2, dim=-1)[0][:, None] for table in tables))


class DreamModel(LanguageModelMixin, DreamGenerationMixin, DreamPreTrainedModel):
    """Dream with its head and parallel `generate()`. The logits at position i - 1 predict the token at position i."""

    logits_shift = 1
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


DreamModel.register_for_auto_class("AutoModelForCausalLM")
