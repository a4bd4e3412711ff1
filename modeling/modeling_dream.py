# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Dream: Qwen2 without the causal mask. The logits at position i - 1 predict the token at position i, as in the
autoregressive model that Dream was trained from ("Dream 7B", https://arxiv.org/abs/2508.15487).

Module names are those of the official checkpoints, which are Qwen2's.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_dream import DreamConfig
from .generation_dream import DreamGenerationMixin
from .layers import (
    BidirectionalPreTrainedModel,
    RMSNorm,
    RotaryTables,
    attention,
    bidirectional_mask,
    prepare_attention,
    select_positions,
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
    def __init__(self, config: DreamConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DreamAttention(config, layer_idx)
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


class DreamBaseModel(DreamPreTrainedModel):
    """The transformer from token ids to normed hidden states."""

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        # Padding is end-of-text, whose embedding is learned like any other: no `padding_idx`.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DreamRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        attention_mask = bidirectional_mask(self.config, hidden_states, attention_mask, past_key_values)
        # In float32 whatever the dtype of the model, and of two equal halves the first.
        tables = self.rotary_emb(hidden_states.float(), position_ids)
        position_embeddings = RotaryTables(*(table.chunk(2, dim=-1)[0][:, None] for table in tables))
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)


class DreamModel(DreamGenerationMixin, DreamPreTrainedModel):
    """Dream with its head and parallel `generate()`. The logits at position i - 1 predict the token at position i."""

    logits_shift = 1
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over a canvas.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): prompt and answer, `[MASK]` where nothing is decided.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at positions that nothing may attend to.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): 0, 1, ... if unset.
            past_key_values (`Cache`, *optional*): keys and values of other positions.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, hidden_size)`, *optional*): in place of `input_ids`.
            logits_to_keep (`int` or `torch.LongTensor`, defaults to 0): positions to apply the head to: 0 for all,
                n for the last n, a tensor `(L,)` for the same ones in each row, `(B, L)` for others in each row.

        Returns:
            `CausalLMOutputWithPast` with `logits` of shape `(B, L, vocab_size)`, unshifted: those at position i - 1
            predict the token at position i.
        """
        if labels is not None:
            raise ValueError("`labels` has no meaning here: the loss depends on what was masked (see `trainer/`).")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))
        return CausalLMOutputWithPast(None, logits, past_key_values, outputs.hidden_states, outputs.attentions)


DreamModel.register_for_auto_class("AutoModelForCausalLM")
