# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Dream: Qwen2 without the causal mask. The logits at position i - 1 predict the token at position i, as in the
autoregressive model that Dream was trained from ("Dream 7B", https://arxiv.org/abs/2508.15487).

Module names are those of the official checkpoints, which are Qwen2's.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_dream import DreamConfig
from .generation_config_diffusion import is_number, require
from .generation_diffusion import DiffusionGenerationMixin, DiffusionGenerationOutput
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

# `alg` of the official `diffusion_generate`, as policy and schedule.
ALGORITHMS = {
    "origin": ("random", "ancestral"),
    "maskgit_plus": ("confidence", "linear_time"),
    "topk_margin": ("margin", "linear_time"),
    "entropy": ("entropy", "linear_time"),
}
# What else it takes that `generate` does not, or means otherwise, with the official defaults.
OFFICIAL_DEFAULTS: dict[str, Any] = {
    "alg": "origin",
    "alg_temp": None,
    "steps": 512,
    "eps": 1e-3,
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "output_history": False,
    "return_dict_in_generate": False,
}


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


class DreamModel(DiffusionGenerationMixin, DreamPreTrainedModel):
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

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        super().adjust_generation_fn(*args, **kwargs)
        config = self.generation_config
        if hasattr(config, "alg"):  # saved by the official code: its numbers are not for `generate`
            names = [name for name in OFFICIAL_DEFAULTS if hasattr(config, name)]
            config.diffusion_generate = {name: getattr(config, name) for name in names}
            for name in names:
                setattr(config, name, None)
            del config.alg

    def diffusion_generate(
        self, inputs: torch.LongTensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> "torch.LongTensor | DreamModelOutput":
        """Deprecated: Dream's own name for decoding the answer as one block. Arguments and, in float32 at temperature
        0, tokens are those of the official code (https://github.com/DreamLM/Dream); `generate()` does the work.

        Args:
            inputs (`torch.LongTensor` of shape `(B, P)`): prompts, padded on the left; also as `input_ids=`.
            generation_config (`GenerationConfig`, *optional*): may hold any of the following; arguments take
                precedence over it, and it over the checkpoint's.
            alg (`str`, defaults to `"origin"`): which tokens a pass writes: `"origin"` (each with the schedule's
                probability, as many in all rows of a batch), `"maskgit_plus"` (the most probable), `"topk_margin"`,
                `"entropy"`.
            alg_temp (`float`, *optional*): above 0, draw them instead of taking the surest. `"origin"` ignores it.
            steps (`int`, defaults to 512): forward passes; those that would write nothing are not made.
            eps (`float`, defaults to 1e-3): where the time of the schedule ends.
            temperature (`float`, defaults to 0), top_p (`float`, *optional*), top_k (`int`, *optional*): of the
                distribution that tokens are drawn from and, unlike in `generate()`, certainty is measured on; at
                temperature 0 the likeliest token is taken. Top-p and top-k leave `[MASK]` out of account.
            output_history (`bool`, defaults to `False`): return the canvas after each pass.
            return_dict_in_generate (`bool`, defaults to `False`): return a `DreamModelOutput`.
            kwargs: `attention_mask`, `max_new_tokens`, `generator` and what else `generate()` takes beside policy,
                blocks and sampling. The official hooks are refused.

        Raises:
            ValueError: for a wrong argument, before any computation.
        """
        for name in ("generation_tokens_hook_func", "generation_logits_hook_func"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(
                    f"`{name}` is not supported: use `streamer` (with `put_draft`) to watch and `logits_processor` to "
                    f"steer."
                )
        official = dict(OFFICIAL_DEFAULTS)
        for layer in (getattr(self.generation_config, "diffusion_generate", {}), vars(generation_config or object)):
            official.update({name: layer[name] for name in official if layer.get(name) is not None})
        official.update({name: kwargs.pop(name) for name in OFFICIAL_DEFAULTS if kwargs.get(name) is not None})
        kwargs = {name: value for name, value in kwargs.items() if name not in official}
        alg, temperature = official["alg"], official["temperature"]
        require(alg in ALGORITHMS, "alg", alg, f"one of {', '.join(map(repr, ALGORITHMS))}")
        for name in ("alg_temp", "temperature"):
            value = official[name]
            require(value is None or (is_number(value) and value >= 0), name, value, "a number of at least 0")
        settings = {
            "unmasking": ALGORITHMS[alg][0],
            "schedule": ALGORITHMS[alg][1],
            "steps": official["steps"],
            "eps": official["eps"],
            "unmasking_temperature": 0.0 if alg == "origin" else official["alg_temp"] or 0.0,
            "block_length": self.config.max_position_embeddings,
            "stop_at_eos": False,
            "do_sample": temperature > 0,
        }
        if temperature:
            settings |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # what is drawn from is warped already
        # What the official code does not know: not from the checkpoint either, where it is for `generate()`.
        for name in ("block_cache", "cache_refresh", "cache_refresh_interval", "eos_threshold"):
            if getattr(generation_config, name, None) is None:
                kwargs.setdefault(name, None)
        if double := settings.keys() & kwargs.keys():
            raise ValueError(f"{sorted(double)} are settled by `alg` here: call `generate()` to choose them.")
        warnings.warn(
            "`diffusion_generate` is deprecated: say `generate("
            + ", ".join(f"{name}={settings[name]!r}" for name in ("unmasking", "schedule", "steps"))
            + ", stop_at_eos=False, block_length=...)`, or try a thresholded policy, which is faster.",
            FutureWarning,
            stacklevel=2,
        )
        output = self.generate(
            inputs,
            generation_config,
            logits_processor=[*(kwargs.pop("logits_processor", None) or []), *self._warpers(official)],
            return_dict_in_generate=True,
            **settings,
            **kwargs,
        )
        if not official["return_dict_in_generate"]:
            return output.sequences
        return DreamModelOutput(**output, history=self._history(output) if official["output_history"] else None)

    def _warpers(self, official):
        """Temperature, top-p and top-k in the official order."""
        warpers, (temperature, top_p, top_k) = (
            LogitsProcessorList(),
            map(official.get, ("temperature", "top_p", "top_k")),
        )
        if temperature:
            warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_p is not None or top_k is not None:
            # Else nothing may be left but [MASK].
            warpers.append(SuppressTokensLogitsProcessor([self.config.mask_token_id]))
        if top_p is not None:
            require(is_number(top_p) and 0 < top_p <= 1, "top_p", top_p, "a number above 0 and at most 1")
            warpers.append(TopPLogitsWarper(float(top_p)))
        if top_k is not None:
            warpers.append(TopKLogitsWarper(top_k))
        return warpers

    def _history(self, output):
        """The canvas after each pass."""
        start = output.sequences.shape[1] - output.unmasking_step.shape[1]
        prompt, answer = output.sequences[:, :start], output.sequences[:, start:]
        written, passes = output.unmasking_step, range(int(output.num_forward_passes.max()))
        answers = (answer.masked_fill((written > last) | (written < 0), self.config.mask_token_id) for last in passes)
        return tuple(torch.cat((prompt, answer), dim=1) for answer in answers)


@dataclass
class DreamModelOutput(DiffusionGenerationOutput):
    """`DiffusionGenerationOutput` with `history`, the canvas (B, P + G) after each pass, if it was asked for."""

    history: tuple[torch.LongTensor, ...] | None = None


DreamModel.register_for_auto_class("AutoModelForCausalLM")
