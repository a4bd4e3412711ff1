# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Parallel decoding of masked diffusion language models behind `model.generate()`.

The prompt is followed by `max_new_tokens` times `[MASK]`: the canvas. It is finished block by block, from left to
right. One step is a forward pass, a token and a certainty for every masked position of the block, and an unmasking
policy that decides which of them become final ("Large Language Diffusion Models", https://arxiv.org/abs/2502.09992,
with the policies of `unmasking.py`). One loop serves every model family: a model owes it `config.mask_token_id`, a
class attribute `logits_shift`, and a `forward` that takes `logits_to_keep`.
"""

import copy
import itertools
import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import GenerationConfig, GenerationMixin, MaxTimeCriteria, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, LogitsProcessorList, StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import ModelOutput, cached_file, logging

from .canvas import Canvas, Layout
from .captured_step import PROMPT_BUCKET, captured_steps
from .generation_config_diffusion import (
    DEFAULT_MAX_NEW_TOKENS,
    DEFAULTS,
    SAMPLING_FIELDS,
    DiffusionGenerationConfig,
    refuse_argument,
    require,
)
from .logits_processing import check_processors, is_positionwise, process
from .token_statistics import token_statistics
from .unmasking import POLICIES, SCHEDULES
from .unmasking_filter import SUBFOLDER, UnmaskingFilter

logger = logging.get_logger(__name__)

LEAVING_SHARE = 0.25  # ended rows leave the batch before a block once they are so many of it
STEP_FIELDS = ("unmasking", "unmasking_temperature", "do_sample")  # what a step depends on beside these:


class Span(NamedTuple):
    """What of a canvas a pass computes: all of it before `size`, or, from `before` positions before the block on,
    `size` positions. It attends to everything before `seen`."""

    before: int | None
    size: int
    seen: int


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns, for B rows, prompts of P and answers of G tokens.

    Args:
        sequences (`torch.LongTensor` of shape `(B, P + G)`): prompts and answers.
        num_forward_passes (`torch.LongTensor` of shape `(B,)`): NFE. A pass counts for a row if the row's current
            block still held a mask.
        tokens_per_forward (`torch.FloatTensor` of shape `(B,)`): TPF: tokens of the answer up to and including the
            first end-of-text, over the NFE.
        unmasking_step (`torch.LongTensor` of shape `(B, G)`): the row's pass (0, 1, ...) after which each position was
            written, -1 if never.
        unmasking_confidence (`torch.FloatTensor` of shape `(B, G)`): probability of the token when it was written, 0
            if never.
    """

    sequences: torch.LongTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    unmasking_step: torch.LongTensor | None = None
    unmasking_confidence: torch.FloatTensor | None = None

    @property
    def num_tokens(self) -> torch.LongTensor:
        """Tokens of each answer up to and including the first end-of-text, (B,)."""
        return (self.tokens_per_forward * self.num_forward_passes).round().long()  # type: ignore[operator]


class DiffusionGenerationMixin(GenerationMixin):
    """`generate()` for masked diffusion language models. Subclass it together with `PreTrainedModel`, and set
    `logits_shift`: 0 where the logits at position i predict token i (LLaDA), 1 where those at i - 1 do (Dream)."""

    logits_shift = 0
    unmasking_filter = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Whatever the order of the bases: transformers' own class attribute would give a plain GenerationConfig.
        if getattr(cls, "generation_config_class", GenerationConfig) is GenerationConfig:
            cls.generation_config_class = DiffusionGenerationConfig

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: Any,
        from_pipeline: Any,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # transformers would load a plain GenerationConfig here and lose our fields.
        names = "cache_dir force_download proxies local_files_only token revision subfolder trust_remote_code".split()
        repository = {**dict(zip(names, args, strict=False)), **kwargs}
        repository.pop("trust_remote_code", None)
        if generation_config is not None:
            self.generation_config = DiffusionGenerationConfig(**generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            try:
                self.generation_config = DiffusionGenerationConfig.from_pretrained(
                    pretrained_model_name_or_path, **repository
                )
            except OSError:
                logger.info("No generation_config.json: decoding by the defaults and the token ids of the model.")
        if pretrained_model_name_or_path is not None:
            folder = "/".join(filter(None, (repository.pop("subfolder", None), SUBFOLDER)))
            try:
                cached_file(pretrained_model_name_or_path, f"{folder}/config.json", **repository)
            except OSError:
                if getattr(self.generation_config, "unmasking", None) == "learned_filter":
                    logger.warning(f"The checkpoint decodes by a learned filter, but none was found in `{folder}`.")
                return
            self.set_unmasking_filter(
                UnmaskingFilter.from_pretrained(pretrained_model_name_or_path, subfolder=folder, **repository)
            )

    def set_unmasking_filter(self, unmasking_filter: UnmaskingFilter | None) -> None:
        """Decode by this filter where `unmasking="learned_filter"`, and save it along with the model."""
        # Not as a part of the model: neither its parameters nor its dtype are the model's.
        self.__dict__["unmasking_filter"] = unmasking_filter

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        if self.unmasking_filter is not None and kwargs.get("push_to_hub"):
            raise ValueError("`push_to_hub=True` would leave the filter behind: call `model.push_to_hub()` instead.")
        # `fully_shard` lays a class of PyTorch's over the model's, and transformers would save that one's code.
        kind = type(self)
        self.__class__ = next(each for each in kind.__mro__ if not each.__module__.startswith("torch.distributed."))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = kind
        if self.unmasking_filter is not None and kwargs.get("is_main_process", True):
            self.unmasking_filter.save_pretrained(Path(save_directory) / SUBFOLDER)

    def _prepare_generation_config(self, generation_config=None, **kwargs):
        """Arguments over `generation_config` over the checkpoint's configuration over the defaults. Returns the
        configuration and the arguments that are no field of it."""
        fields = DiffusionGenerationConfig().to_dict()
        defaults = DEFAULTS | {"mask_token_id": self.config.mask_token_id}
        settings = DiffusionGenerationConfig._get_default_generation_params() | defaults
        arguments = {name: value for name, value in kwargs.items() if name in fields}
        ok = generation_config is None or isinstance(generation_config, GenerationConfig)
        require(ok, "generation_config", generation_config, "a GenerationConfig (arguments may be given by name, too)")
        given = {} if generation_config is None else generation_config.to_dict()
        for layer in (self.generation_config.to_dict(), given, arguments):
            layer = {name: value for name, value in layer.items() if value is not None}
            # A number belongs to the policy that it was given for, and one length replaces the other.
            if layer.get("unmasking", settings["unmasking"]) != settings["unmasking"]:
                settings["threshold"] = settings["steps"] = None
            if "max_length" in layer:
                settings["max_new_tokens"] = None
            # Nor does a number outlive what it needs.
            if layer.get("stop_at_eos") is False:
                settings["eos_threshold"] = None
            if layer.get("cache_refresh") == "previous_block":
                settings["cache_refresh_interval"] = None
            settings.update(layer)
        settings.update({name: defaults.get(name) for name, value in arguments.items() if value is None})
        return DiffusionGenerationConfig(**settings), {k: v for k, v in kwargs.items() if k not in fields}

    def _check_config(self, config, model_kwargs):
        """Refuse what diffusion decoding cannot do, and arguments that it does not have."""
        config.check(self.config.vocab_size)
        for name, value in model_kwargs.items():
            if name not in ("input_ids", "attention_mask") and value is not None:
                refuse_argument(name)

    def _check_inputs(self, inputs, config, model_kwargs):
        """Validate and return `input_ids` and `attention_mask`, both (B, P); None for a mask that hides nothing."""
        input_ids, attention_mask = model_kwargs.get("input_ids"), model_kwargs.get("attention_mask")
        # Without a prompt the answer follows the beginning of text, as everywhere in transformers.
        is_empty = inputs is None and input_ids is None and config.bos_token_id is not None
        if not is_empty and (inputs is None) == (input_ids is None):
            raise ValueError(
                "Exactly one of `inputs` and `input_ids` must be given, token ids of shape (B, P); or neither, if "
                "`bos_token_id` is set."
            )
        input_ids = inputs if input_ids is None else input_ids
        if is_empty:
            input_ids = torch.tensor([[config.bos_token_id]], device=self.device)
        if isinstance(input_ids, Mapping) or hasattr(input_ids, "input_ids"):
            raise ValueError(
                f"`inputs` is a {type(input_ids).__name__}, as tokenizers return it: it must be unpacked, "
                f"`generate(**inputs)`."
            )
        is_tensor = isinstance(input_ids, torch.Tensor)
        if not is_tensor or input_ids.ndim != 2 or input_ids.dtype not in (torch.long, torch.int):
            got = f"{input_ids.dtype} of {tuple(input_ids.shape)}" if is_tensor else type(input_ids).__name__
            raise ValueError(f"`input_ids` must be an integer tensor of shape (B, P), but got {got}.")
        input_ids = input_ids.long()
        vocab_size = self.config.vocab_size
        if ((input_ids < 0) | (input_ids >= vocab_size)).any():
            low, high = input_ids.min().item(), input_ids.max().item()
            raise ValueError(f"`input_ids` holds ids from {low} to {high}: they must be from 0 to {vocab_size - 1}.")
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
                got = tuple(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__
                shape = tuple(input_ids.shape)
                raise ValueError(f"`attention_mask` must have the shape of `input_ids`, {shape}, but got {got}.")
            if ((attention_mask != 0) & (attention_mask != 1)).any():
                raise ValueError("`attention_mask` holds other values than 0 (padding) and 1: only those are allowed.")
            attention_mask = attention_mask.to(input_ids)
            if (attention_mask.diff(dim=1) < 0).any():
                raise ValueError(
                    "`attention_mask` has zeros behind ones: prompts must be padded on the left "
                    '(`padding_side="left"` in the tokenizer).'
                )
            if attention_mask.all():
                attention_mask = None
        real = input_ids != config.mask_token_id
        if not (real if attention_mask is None else real | (attention_mask == 0)).all():
            raise ValueError(
                f"`input_ids` holds `mask_token_id={config.mask_token_id}`: a prompt must not contain [MASK]."
            )
        last_column = torch.ones_like(input_ids[:, -1:]) if attention_mask is None else attention_mask[:, -1:]
        if self.logits_shift and (input_ids.shape[1] == 0 or not last_column.all()):
            raise ValueError("`input_ids` has a row without a token: this model predicts from the token before.")
        return input_ids, attention_mask

    def _check_adapter(self):
        """Refuse adapters that count on tokens coming one after the other: a learned prompt, which peft hands to
        `prepare_inputs_for_generation`, and aLoRA, which counts positions from the end of the text."""
        adapted = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None)
        adapter = getattr(adapted, "active_peft_config", None)
        has_prompt = adapter is not None and adapter.is_prompt_learning
        if has_prompt or "alora_offsets" in self._arguments_of_peft():
            kind = adapter.peft_type.value if has_prompt else "aLoRA"
            raise ValueError(
                f"The adapter is of the kind {kind}, which `generate()` does not support: it must be one that changes "
                f"weights in all positions, such as LoRA."
            )

    def _arguments_of_peft(self) -> set[str]:
        """What peft gives to each of its layers during this call, by hooks: `adapter_names`, for example."""
        hooks = (hook for module in self.modules() for hook in module._forward_pre_hooks.values())
        return {name for hook in hooks if isinstance(hook, partial) for name in hook.keywords}

    @staticmethod
    def _check_objects(logits_processor, stopping_criteria, streamer, generator):
        """Refuse what is not of the kind that is wanted."""
        for name, value in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
            ok = value is None or (isinstance(value, (list, tuple)) and all(map(callable, value)))
            require(ok, name, value, "a list of callables")
        ok = streamer is None or (hasattr(streamer, "put") and hasattr(streamer, "end"))
        require(ok, "streamer", streamer, "an object with `put` and `end`")
        ok = generator is None or isinstance(generator, torch.Generator)
        require(ok, "generator", generator, "a torch.Generator on the device of `input_ids`")

    def _check_filter(self, unmasking_filter, config, device):
        """The filter to decode by, on the device, or None."""
        if config.unmasking != "learned_filter":
            allowed = f"left out with `unmasking={config.unmasking!r}`, which has no filter"
            require(unmasking_filter is None, "unmasking_filter", unmasking_filter, allowed)
            return None
        if unmasking_filter is None:
            unmasking_filter = self.unmasking_filter
        # Not by its class: that of remote code is another one.
        ok = getattr(getattr(unmasking_filter, "config", None), "model_type", None) == "unmasking_filter"
        allowed = "an UnmaskingFilter with `unmasking='learned_filter'`, as the checkpoint has none of its own"
        require(ok, "unmasking_filter", unmasking_filter, allowed)
        length = unmasking_filter.config.block_length
        allowed = f"{length}, as the filter was trained for blocks of that length"
        require(config.block_length == length, "block_length", config.block_length, allowed)
        return unmasking_filter.to(device, torch.float32).eval()

    def _set_length(self, config, prompt_length):
        """Settle `max_new_tokens` and `max_length` (prompt and answer together) for this prompt length."""
        limit = getattr(self.config, "max_position_embeddings", None) or math.inf
        if config.max_new_tokens is None:
            if config.max_length is None:
                config.max_new_tokens = max(min(DEFAULT_MAX_NEW_TOKENS, limit - prompt_length), 1)
            else:
                config.max_new_tokens = config.max_length - prompt_length
                allowed = f"above the prompt length, {prompt_length}"
                require(config.max_new_tokens > 0, "max_length", config.max_length, allowed)
        config.max_length = prompt_length + config.max_new_tokens
        if config.max_length > limit:
            raise ValueError(
                f"A prompt of {prompt_length} tokens and `max_new_tokens={config.max_new_tokens}` make "
                f"{config.max_length}: together they must be at most `config.max_position_embeddings={limit}`."
            )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        synced_gpus: bool | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generator: torch.Generator | None = None,
        unmasking_filter: UnmaskingFilter | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor | DiffusionGenerationOutput:
        """Decode answers to a batch of prompts, several tokens per forward pass.

        A row's answer and NFE do not depend on the other rows, up to the rounding of floating-point sums and where
        something is drawn.

        Args:
            inputs (`torch.LongTensor` of shape `(B, P)`): prompts, padded on the left; also as `input_ids=`. Without
                them, the answer follows `bos_token_id`.
            generation_config (`GenerationConfig`, *optional*): fields that are set take precedence over the
                checkpoint's; arguments take precedence over both.
            logits_processor (`LogitsProcessorList`, *optional*): called for each position of the block with the ids to
                its left (B, P + i), `[MASK]` where they are undecided or padding, and its logits (B, V). Certainty is
                measured on what they return. Standard ones that need the tokens before to be decided (prefix
                constraints, n-grams) are refused unless `block_length` is 1.
            stopping_criteria (`StoppingCriteriaList`, *optional*): called when a block is complete, for every length
                inside it, so that a row is cut where decoding token by token would have cut it. `max_time` is
                looked at after every pass; a row that it ends keeps its text up to the first undecided position.
            synced_gpus (`bool`, *optional*): keep making passes until every process is done; by default under
                DeepSpeed ZeRO-3 and FSDP.
            streamer (`BaseStreamer`, *optional*): receives the prompt, then the decided text as it grows (with
                stopping criteria: as blocks are completed), and, where it has `put_draft`, the rest of the block after
                every pass. Batch size 1 only.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for `stop_strings`.
            generator (`torch.Generator`, *optional*): on the model's device, for all that is drawn: tokens, and
                positions by `unmasking="random"`, `schedule="ancestral"` and `unmasking_temperature`. PyTorch's
                global one if unset.
            unmasking_filter (`UnmaskingFilter`, *optional*): of `unmasking="learned_filter"`; it moves to the model's
                device, in float32. By default the one that the checkpoint carries (`set_unmasking_filter`).
            kwargs: `attention_mask` (B, P), 0 at padding, and any field of `DiffusionGenerationConfig`.

        Returns:
            `torch.LongTensor` of shape `(B, P + G)`, or a `DiffusionGenerationOutput` if `return_dict_in_generate`.
            With `stop_at_eos` everything behind a row's first end-of-text is `pad_token_id`; without, the canvas is
            returned as decoded.

        Raises:
            ValueError: for a wrong argument or input, before any computation.
        """
        config, model_kwargs = self._prepare_generation_config(generation_config, **kwargs)
        self._check_config(config, model_kwargs)
        self._check_adapter()
        input_ids, attention_mask = self._check_inputs(inputs, config, model_kwargs)
        self._set_length(config, input_ids.shape[1])
        policy = POLICIES[config.unmasking]
        for name, why in config.ignored().items():
            if name in kwargs or getattr(generation_config, name, None) is not None:
                logger.warning(f"`{name}` is ignored: {why}.")
        if config.threshold is None:
            config.threshold = policy.default
        if config.steps is None:
            config.steps = config.max_new_tokens
        if synced_gpus is None:
            synced_gpus = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self)
        synced_gpus = synced_gpus and dist.is_initialized() and dist.get_world_size() > 1
        self._check_objects(logits_processor, stopping_criteria, streamer, generator)
        check_processors(logits_processor, config.block_length)
        unmasking_filter = self._check_filter(unmasking_filter, config, input_ids.device)

        self._prepare_special_tokens(config, "attention_mask" in kwargs, input_ids.device, input_ids.shape[0])
        input_ids, model_kwargs = self._expand_inputs_for_generation(
            expand_size=config.num_return_sequences or 1, input_ids=input_ids, attention_mask=attention_mask
        )
        attention_mask = model_kwargs["attention_mask"]
        if streamer is not None and input_ids.shape[0] != 1:
            raise ValueError(f"`streamer` needs a batch of 1, but `input_ids` has {input_ids.shape[0]} rows.")
        criteria = self._diffusion_stopping_criteria(config, stopping_criteria, tokenizer)
        if config._pad_token_tensor is None and criteria:
            raise ValueError("`pad_token_id=None`: it must be set (or `eos_token_id`) where rows may end early.")
        processors, warpers = self._diffusion_logits_processors(config, logits_processor, input_ids, attention_mask)

        if streamer is not None:
            streamer.put(input_ids.cpu())
        # Whatever is handed in from outside may change from step to step.
        is_drawn = config.do_sample or (
            policy.is_scheduled
            and (config.unmasking == "random" or config.schedule == "ancestral" or config.unmasking_temperature)
        )
        is_fixed = not (config.disable_compile or synced_gpus or processors or (generator is not None and is_drawn))
        steps = captured_steps(self) if is_fixed else None
        batch_size, prompt_length = input_ids.shape
        padding = 0 if steps is None else -prompt_length % PROMPT_BUCKET
        eos = () if config._eos_token_tensor is None or not config.stop_at_eos else config._eos_token_tensor.tolist()
        layout = Layout(
            batch_size, prompt_length + padding, config.max_new_tokens, attention_mask is not None or padding > 0,
            config.block_cache != "none",
            config.mask_token_id, tuple(eos), config.eos_threshold, input_ids.device,
        )  # fmt: skip
        canvas = Canvas(layout) if steps is None else steps.borrow(layout)
        canvas.load(input_ids, attention_mask)
        with torch.cuda.device(input_ids.device) if input_ids.is_cuda else nullcontext():
            canvas = self._decode(
                canvas, steps, config, processors, warpers, criteria, streamer, synced_gpus, generator,
                unmasking_filter,
            )  # fmt: skip
        while self._has_unfinished_sequences(True, synced_gpus, input_ids.device):
            self(input_ids=canvas.ids[:, -1:])  # only so that the other processes can gather their weights
        if streamer is not None:
            streamer.end()
        output = self._finish(canvas, config)
        if steps is not None:
            steps.give_back(canvas)
        return output

    def _diffusion_stopping_criteria(self, config, stopping_criteria, tokenizer):
        config = copy.copy(config)  # length and end-of-text are the loop's own matter
        config.max_length = config._eos_token_tensor = None
        return self._get_stopping_criteria(config, StoppingCriteriaList(stopping_criteria or []), tokenizer)

    def _diffusion_logits_processors(self, config, logits_processor, input_ids, attention_mask):
        """Those that shape the distribution, whose certainty counts, apart from those that only shape the sampling."""
        common = {"input_ids_seq_length": input_ids.shape[1], "device": input_ids.device}
        processors = copy.copy(config)
        processors.do_sample = False
        processors = self._get_logits_processor(
            processors,
            logits_processor=LogitsProcessorList(logits_processor or []),
            model_kwargs={"attention_mask": attention_mask},
            **common,
        )
        if not config.do_sample:
            return processors, None
        sampling = GenerationConfig(do_sample=True, **{name: getattr(config, name) for name in SAMPLING_FIELDS})
        return processors, self._get_logits_processor(sampling, **common)

    def _decode(
        self, canvas, steps, config, processors, warpers, criteria, streamer, synced_gpus, generator, unmasking_filter
    ):
        """The loop. See the module's docstring. Returns the canvas that holds all rows."""
        clocks = [criterion for criterion in criteria if isinstance(criterion, MaxTimeCriteria)]
        criteria = StoppingCriteriaList(criterion for criterion in criteria if criterion not in clocks)
        finished, reach, streamed = [0] * canvas.layout.batch_size, canvas.length, 0
        # What a user gave may count on the rows that it was given with, as adapters do of which each row has its own.
        has_own_adapters = "adapter_names" in self._arguments_of_peft()
        rows_may_leave = not criteria and is_positionwise(processors) and not has_own_adapters
        tensors = [] if unmasking_filter is None else [*unmasking_filter.parameters(), *unmasking_filter.buffers()]
        fixed = (  # what steps depend on, beside the span and the block's length
            *(tensor.data_ptr() for tensor in tensors),
            *(getattr(config, name) for name in STEP_FIELDS + SAMPLING_FIELDS),
        )
        for block, settings in self._blocks(config, generator):
            if rows_may_leave and not all(finished):
                canvas, finished = self._without_ended_rows(canvas, steps, finished)
            canvas.enter(block)
            is_open, passes = not all(finished), itertools.count()
            while is_open:
                self._has_unfinished_sequences(False, synced_gpus, canvas.ids.device)
                if steps is not None:  # few lengths, so that graphs are found again
                    reach = min(-(-reach // config.block_length) * config.block_length, canvas.length)
                reach = max(reach, block.stop)
                span = self._span(config, canvas.prompt_length, block, reach, next(passes))
                canvas.setting.fill_(next(settings))
                step = partial(self._step, canvas, span, config, processors, warpers, generator, unmasking_filter)
                if steps is None:
                    step()
                else:
                    steps.run(canvas, (span, canvas.block_length, *fixed), step)
                is_open, finished, decided, reach = canvas.look()
                is_late = any(clock(torch.empty(1, 0), None).any() for clock in clocks)
                if is_late:
                    canvas.finish(canvas.end.new_tensor(decided))
                if criteria and (is_late or not is_open):
                    self._finish_by_criteria(canvas, block, criteria)
                if is_late or (criteria and not is_open):
                    canvas.observe()
                    is_open, finished, decided, reach = canvas.look()
                if streamer is not None:
                    hold_back = bool(criteria) and is_open  # a criterion may still cut inside the block
                    stop = block.start if hold_back else decided[0]
                    if stop > streamed:
                        streamer.put(canvas.answer[0, streamed:stop].cpu())
                        streamed = stop
                    if hasattr(streamer, "put_draft") and not finished[0] and streamed < block.stop:
                        streamer.put_draft(value=canvas.answer[0, streamed : block.stop].cpu())
        while canvas.parent is not None:
            parent = canvas.reunite()
            if steps is not None:
                steps.give_back(canvas)
            canvas = parent
        return canvas

    def _without_ended_rows(self, canvas, steps, finished):
        """Go on with a smaller canvas if enough rows have ended (a list of bool) for that to pay. Returns the canvas
        and which of its rows have ended."""
        size = staying = len(finished) - sum(finished)
        if steps is not None:
            size = 2 ** (staying - 1).bit_length()  # few sizes, so that graphs are found again; ended rows fill it
        if size > (1 - LEAVING_SHARE) * len(finished):
            return canvas, finished
        rows = sorted(range(len(finished)), key=lambda row: finished[row])[:size]
        layout = canvas.layout._replace(batch_size=size)
        smaller = Canvas(layout) if steps is None else steps.borrow(layout)
        smaller.take_rows(canvas, torch.tensor(rows, device=canvas.ids.device))
        if steps is None:
            canvas.cache = None
        return smaller, [finished[row] for row in rows]

    def _blocks(self, config, generator):
        """Each block of the answer, with the policy's number for each of its steps."""
        policy, length = POLICIES[config.unmasking], config.block_length
        starts = range(0, config.max_new_tokens, length)
        for i, start in enumerate(starts):
            block = slice(start, min(start + length, config.max_new_tokens))
            if policy.is_scheduled:
                steps = max(config.steps // len(starts) + (i < config.steps % len(starts)), 1)
                counts = SCHEDULES[config.schedule](block.stop - start, steps, eps=config.eps, generator=generator)
                yield block, iter(counts)
            else:
                yield block, itertools.repeat(config.threshold)

    def _span(self, config, prompt_length, block, reach, number):
        """What a block's pass of this number (0, 1, ...) computes anew."""
        seen, interval = prompt_length + reach, config.cache_refresh_interval
        whole = Span(None, seen, seen)
        if config.block_cache == "none" or (interval and number % interval == 0):
            return whole
        before = self.logits_shift  # from where the block's first token is predicted
        if number == 0:
            if block.start == 0 or config.cache_refresh == "full":
                return whole
            before += config.block_length
        stop = block.stop if config.block_cache == "dual" else reach
        return Span(before, stop - block.start + before, seen)

    def _step(self, canvas, span, config, processors, warpers, generator, unmasking_filter):
        """One pass, and what the policy writes after it. Nothing here waits for the device, and what changes from step
        to step is in the canvas: see `captured_step.py`."""
        policy = POLICIES[config.unmasking]
        logits = self._block_logits(canvas, span, processors)
        statistics = token_statistics(logits, config.mask_token_id, warpers, generator)
        number = {"threshold": canvas.setting}
        if policy.is_scheduled:
            number = {"count": canvas.setting, "temperature": config.unmasking_temperature}
        undecided = canvas.undecided[:, canvas.block]
        if unmasking_filter is not None:
            statistics = statistics._replace(finality=unmasking_filter.finality(statistics, undecided))
        canvas.write(statistics, policy.select(statistics, undecided, generator=generator, **number))

    def _block_logits(self, canvas, span, processors):
        """Logits (B, K, V) that predict the block's positions, from a pass over a span of the canvas."""
        start = canvas.prompt_length + canvas.block_start
        predicting = canvas.offsets[: canvas.block_length] - self.logits_shift
        if span.before is None:
            columns, predicting = slice(span.size), start + predicting
        else:
            columns, predicting = start - span.before + canvas.offsets[: span.size], span.before + predicting
        positions = canvas.offsets[None] if canvas.position_ids is None else canvas.position_ids
        arguments = {}
        if canvas.cache is not None:
            arguments["past_key_values"] = canvas.cache.place(None if span.before is None else columns, span.seen)
        logits = self(
            input_ids=canvas.ids[:, columns],
            attention_mask=None if canvas.attention_mask is None else canvas.attention_mask[:, : span.seen],
            position_ids=positions[:, columns],
            logits_to_keep=predicting,
            **arguments,
        ).logits
        if canvas.cache is not None and not canvas.cache.keys:
            raise ValueError(
                f"`block_cache` needs a model that keeps `past_key_values`: {type(self).__name__} does not."
            )
        if is_positionwise(processors):
            return process(processors, logits, None, 0)
        ids, first = canvas.ids, canvas.prompt_length + int(canvas.block_start)
        if canvas.position_ids is not None:
            # Padding is no text: show what is no text either, and whose logit does not count.
            ids = ids.masked_fill(canvas.attention_mask == 0, canvas.layout.mask_token_id)
        return process(processors, logits, ids, first)

    def _finish_by_criteria(self, canvas, block, criteria):
        """End the rows for which a criterion holds, at the first length inside the complete block at which it does."""
        end = canvas.end.new_full(canvas.end.shape, canvas.length + 1)
        for length in range(block.start + 1, block.stop + 1):
            stops = criteria(canvas.ids[:, canvas.padding : canvas.prompt_length + length], None).to(end.device)
            end = torch.where(stops & (end > length) & (canvas.end >= length), length, end)
        canvas.finish(end)

    def _finish(self, canvas, config):
        """Pad what is behind the end of each row, and make the output. It shares nothing with the canvas, which may be
        used again."""
        pad = config._pad_token_tensor
        if pad is not None:
            behind = canvas.offsets[: canvas.length] >= canvas.end[:, None]
            canvas.answer.copy_(torch.where(behind, pad, canvas.answer))
        is_broken = canvas.unmasking_confidence.isnan().any(dim=1)
        if is_broken.any():
            logger.warning(
                f"The logits of the rows {is_broken.nonzero().flatten().tolist()} were not numbers (NaN), so their "
                f"answers mean nothing: the weights may be broken, or float16 too small for this model; load it with "
                f"dtype=torch.bfloat16 or torch.float32."
            )
        sequences = canvas.ids[:, canvas.padding :].clone()
        if not config.return_dict_in_generate:
            return sequences
        length = canvas.end
        if config._eos_token_tensor is not None:
            is_eos = torch.isin(canvas.answer, config._eos_token_tensor)
            first = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1) + 1, canvas.length)
            length = torch.minimum(length, first)
        return DiffusionGenerationOutput(
            sequences=sequences,
            num_forward_passes=canvas.num_passes.clone(),
            tokens_per_forward=length / canvas.num_passes.clamp(min=1),
            unmasking_step=canvas.unmasking_step.clone(),
            unmasking_confidence=canvas.unmasking_confidence.clone(),
        )
