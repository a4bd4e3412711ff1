# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""`diffusion_generate()` as Dream's users know it ("Dream 7B", https://arxiv.org/abs/2508.15487)."""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .generation_config_diffusion import DiffusionGenerationConfig, is_number, require
from .generation_diffusion import DiffusionGenerationMixin, DiffusionGenerationOutput

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


@dataclass
class DreamModelOutput(DiffusionGenerationOutput):
    """`DiffusionGenerationOutput` with `history`, the canvas (B, P + G) after each pass, if it was asked for."""

    history: tuple[torch.LongTensor, ...] | None = None


class DreamGenerationMixin(DiffusionGenerationMixin):
    """`DiffusionGenerationMixin` with Dream's own name and arguments for decoding beside it."""

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
                probability), `"maskgit_plus"` (the most probable), `"topk_margin"`,
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
        if generation_config is not None:  # whose official names mean nothing to `generate()`
            generation_config = copy.deepcopy(generation_config)
            for name in official.keys() - DiffusionGenerationConfig().to_dict().keys():
                vars(generation_config).pop(name, None)
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
