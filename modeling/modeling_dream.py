"""Dream: Qwen2 without the causal mask. The logits at position i - 1 predict the token at position i, as in the
autoregressive model that Dream was trained from ("Dream 7B", https://arxiv.org/abs/2508.15487).

Blocks, norms and rotary embedding are transformers' own Qwen2, whose module names are those of the official
checkpoints.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Qwen2Model, Qwen2PreTrainedModel
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_dream import DreamConfig
from .generation_diffusion import DiffusionGenerationMixin, DiffusionGenerationOutput, select_positions

# `alg` of the official `diffusion_generate`, as policy and schedule.
ALGORITHMS = {
    "origin": ("random", "ancestral"),
    "maskgit_plus": ("confidence", "linear_time"),
    "topk_margin": ("margin", "linear_time"),
    "entropy": ("entropy", "linear_time"),
}


class DreamBaseModel(Qwen2Model):
    """The transformer from token ids to normed hidden states."""

    config_class = DreamConfig

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.is_causal = False  # read by transformers' attention functions
        # Padding is end-of-text, whose embedding is learned like any other.
        self.embed_tokens.padding_idx = None

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # To find out that a mask hides nothing costs a wait for the device in every pass; whoever has no padding
            # passes no mask.
            allow_is_bidirectional_skip=attention_mask is None,
        )
        return super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask={"full_attention": attention_mask},  # in place of the causal one that it would make
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,  # never one of its own
            **kwargs,
        )


class DreamModel(DiffusionGenerationMixin, Qwen2PreTrainedModel):
    """Dream with its head and parallel `generate()`. The logits at position i - 1 predict the token at position i."""

    config_class = DreamConfig
    logits_shift = 1
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
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        labels=None,
        **kwargs,
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
        return CausalLMOutputWithPast(
            logits=self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep)),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def diffusion_generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config=None,
        *,
        alg: str = "origin",
        alg_temp: float | None = None,
        steps: int = 512,
        eps: float = 1e-3,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        output_history: bool = False,
        return_dict_in_generate: bool = False,
        generation_tokens_hook_func=None,
        generation_logits_hook_func=None,
        **kwargs,
    ) -> "torch.LongTensor | DreamModelOutput":
        """Deprecated: Dream's own name for decoding the answer as one block. Arguments and, at temperature 0, tokens
        are those of the official code (https://github.com/DreamLM/Dream); `generate()` does the work.

        Args:
            inputs (`torch.LongTensor` of shape `(B, P)`): prompts, padded on the left; also as `input_ids=`.
            generation_config (`GenerationConfig`, *optional*): for what is not an argument here.
            alg (`str`, defaults to `"origin"`): which tokens a step writes: `"origin"` (any), `"maskgit_plus"` (the
                most probable), `"topk_margin"`, `"entropy"`.
            alg_temp (`float`, *optional*): above 0, draw them instead of taking the surest. `"origin"` ignores it.
            steps (`int`, defaults to 512): forward passes; those that would write nothing are not made.
            eps (`float`, defaults to 1e-3): where the time of the schedule ends.
            temperature, top_p, top_k: of the distribution that tokens are drawn from and certainty is measured on;
                at temperature 0 the likeliest token is taken.
            output_history (`bool`, defaults to `False`): return the canvas after each pass.
            return_dict_in_generate (`bool`, defaults to `False`): return a `DreamModelOutput`.
            generation_tokens_hook_func, generation_logits_hook_func: refused.
            kwargs: as for `generate()`: `attention_mask`, `max_new_tokens`, `generator`, ...

        Raises:
            ValueError: for a wrong argument, before any computation.
        """
        for name, hook in (("tokens", generation_tokens_hook_func), ("logits", generation_logits_hook_func)):
            if hook is not None:
                raise ValueError(
                    f"`generation_{name}_hook_func` is not supported: use `streamer` (with `put_draft`) to watch and "
                    f"`logits_processor` to steer."
                )
        if alg not in ALGORITHMS:
            raise ValueError(f"`alg={alg!r}` is not allowed: it must be one of {', '.join(map(repr, ALGORITHMS))}.")
        for name, value in (("alg_temp", alg_temp), ("temperature", temperature)):
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}={value!r}` is not allowed: it must be a number of at least 0.")
        unmasking, schedule = ALGORITHMS[alg]
        warnings.warn(
            f"`diffusion_generate` is deprecated: say `generate(unmasking={unmasking!r}, schedule={schedule!r}, "
            f"steps={steps}, block_length=..., stop_at_eos=False)`, or try a thresholded policy, which is faster.",
            FutureWarning,
            stacklevel=2,
        )
        processors = LogitsProcessorList(kwargs.pop("logits_processor", None) or [])
        if temperature:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_p is not None and top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        if top_k is not None:
            processors.append(TopKLogitsWarper(top_k))
        sampling = {"do_sample": bool(temperature), "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        output = self.generate(
            inputs,
            generation_config,
            logits_processor=processors,
            unmasking=unmasking,
            schedule=schedule,
            steps=steps,
            eps=eps,
            unmasking_temperature=0.0 if alg == "origin" else alg_temp or 0.0,
            block_length=self.config.max_position_embeddings,
            stop_at_eos=False,
            return_dict_in_generate=True,
            **sampling,
            **kwargs,
        )
        if not return_dict_in_generate:
            return output.sequences
        return DreamModelOutput(**output, history=self._history(output) if output_history else None)

    def _history(self, output):
        """The canvas after each pass."""
        start = output.sequences.shape[1] - output.unmasking_step.shape[1]
        prompt, answer = output.sequences[:, :start], output.sequences[:, start:]
        mask, passes = self.config.mask_token_id, range(int(output.num_forward_passes.max()))
        answers = (answer.masked_fill(output.unmasking_step > last, mask) for last in passes)
        return tuple(torch.cat((prompt, answer), dim=1) for answer in answers)


@dataclass
class DreamModelOutput(DiffusionGenerationOutput):
    """`DiffusionGenerationOutput` with `history`, the canvas (B, P + G) after each pass, if it was asked for."""

    history: tuple[torch.LongTensor, ...] | None = None


DreamModel.register_for_auto_class("AutoModelForCausalLM")
