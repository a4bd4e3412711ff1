# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""LLaDA: a Llama-like transformer without the causal mask, which predicts every masked position at once.

Module names are those of the official checkpoints, so weights, adapters and other engines agree without conversion.
The architecture is described in "Large Language Diffusion Models" (https://arxiv.org/abs/2502.09992).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import OutputRecorder

from .configuration_llada import LLaDAConfig
from .generation_diffusion import DiffusionGenerationMixin
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


def rotary_tables(position_ids: torch.Tensor, head_dim: int, theta: float) -> RotaryTables:
    """Of float32 angles, like in the official code (`rope_full_precision`). Recomputed in each pass: it costs nothing,
    and there is no buffer that a cast or a meta device could spoil."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[:, None, :, None].float() * (1.0 / theta**exponents)
    return RotaryTables(angles.cos(), angles.sin())


class LLaDALlamaBlock(GradientCheckpointingLayer):
    """Attention and gated MLP, each behind a norm. The official code keeps all projections in the block itself."""

    packed_projections = (("q_proj", "k_proj", "v_proj"), ("ff_proj", "up_proj"))

    def __init__(self, config: LLaDAConfig, layer_idx: int):
        super().__init__()
        prepare_attention(self, config, layer_idx)
        kv_size = config.n_kv_heads * self.head_dim
        self.attn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: RotaryTables,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        projected = project(self.attn_norm(hidden_states), (self.q_proj, self.k_proj, self.v_proj))
        mixed, weights = attention(self, projected, position_embeddings, attention_mask, past_key_values, **kwargs)
        hidden_states, x = self.ff_norm(self.attn_out(mixed), residual=hidden_states)
        hidden_states = hidden_states + self.ff_out(silu_product(*project(x, (self.ff_proj, self.up_proj))))
        return hidden_states, weights


class LLaDAPreTrainedModel(BidirectionalPreTrainedModel):
    config_class = LLaDAConfig
    _no_split_modules = ["LLaDALlamaBlock"]
    _can_record_outputs = {"hidden_states": LLaDALlamaBlock, "attentions": OutputRecorder(LLaDALlamaBlock, index=1)}


class LLaDAModel(TransformerMixin, LLaDAPreTrainedModel):
    """The transformer from token ids to normed hidden states. As in the official checkpoints it also *holds* the head
    (`transformer.ff_out`), which `LLaDAModelLM` applies."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(LLaDALlamaBlock(config, i) for i in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
            }
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value

    def parts(self) -> tuple[Iterable[nn.Module], nn.Module]:
        return self.transformer.blocks, self.transformer.ln_f

    def rotary_tables(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> RotaryTables:
        head_dim = self.config.d_model // self.config.n_heads
        return rotary_tables(position_ids, head_dim, self.config.rope_theta)


class LLaDAModelLM(LanguageModelMixin, DiffusionGenerationMixin, LLaDAPreTrainedModel):
    """LLaDA with its head and parallel `generate()`. The logits at position i predict the token at position i."""

    logits_shift = 0
    _tied_weights_keys = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"}

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.transformer.ff_out

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.model.transformer.ff_out = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = embeddings.num_embeddings  # transformers only knows of `vocab_size`
        return embeddings


LLaDAModelLM.register_for_auto_class("AutoModelForCausalLM")
