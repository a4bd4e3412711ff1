# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""What the model families have in common: the way from token ids to hidden states, and on to logits."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .layers import RotaryTables, diffusion_mask, select_positions


class TransformerMixin:
    """The pass of a family's transformer. The family says where its parts are."""

    config: PreTrainedConfig
    get_input_embeddings: Callable[[], nn.Module]

    def parts(self) -> tuple[Iterable[nn.Module], nn.Module]:
        """The layers, in order, and the norm behind them."""
        raise NotImplementedError

    def rotary_tables(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> RotaryTables:
        """Of these positions (B or 1, T), on the device of the hidden states."""
        raise NotImplementedError

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
        hidden_states = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        is_block_causal = self.config.block_causal_length is not None
        if position_ids is None and is_block_causal and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # blocks begin where the row does
        elif position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        attention_mask = diffusion_mask(self.config, hidden_states, attention_mask, position_ids, past_key_values)
        position_embeddings = self.rotary_tables(hidden_states, position_ids)
        layers, norm = self.parts()
        for layer in layers:
            hidden_states, _ = layer(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        return BaseModelOutputWithPast(norm(hidden_states), past_key_values)


class LanguageModelMixin:
    """The pass of a transformer, `self.model`, and its head. `logits_shift` of the class is 0 where the logits at
    position i predict the token at i, and 1 where those at i - 1 do."""

    model: nn.Module
    get_output_embeddings: Callable[[], nn.Module]

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

        With `config.block_causal_length=L`, a position attends to those of its own block of L tokens and of the blocks
        before it, where blocks count from the row's first token, prompt included; with None, to all.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): prompt and answer, `[MASK]` where nothing is decided.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at positions that nothing may attend to.
                Or of shape `(B or 1, 1, T, T)`, bool, which queries may attend to which keys, or a `BlockMask`: then
                nothing else counts, neither blocks nor padding.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): 0, 1, ... if unset; in a block-causal
                model from the first position of a row that the mask does not hide.
            past_key_values (`Cache`, *optional*): keys and values of other positions.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*): in place of `input_ids`.
            logits_to_keep (`int` or `torch.LongTensor`, defaults to 0): positions to apply the head to: 0 for all,
                n for the last n, a tensor `(L,)` for the same ones in each row, `(B, L)` for others in each row.

        Returns:
            `CausalLMOutputWithPast` with `logits` of shape `(B, L, V)`, unshifted, see `logits_shift`.
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
        logits = self.get_output_embeddings()(select_positions(outputs.last_hidden_state, logits_to_keep))
        return CausalLMOutputWithPast(None, logits, past_key_values, outputs.hidden_states, outputs.attentions)
