# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Parallel decoding of masked diffusion language models behind `model.generate()`.

The prompt is followed by `max_new_tokens` times `[MASK]`. The answer is finished block by block, from left to right.
One step is a forward pass, a token and a certainty for every masked position of the block, and an unmasking policy
that decides which of them become final ("Large Language Diffusion Models", https://arxiv.org/abs/2502.09992, with the
policies of `unmasking.py`). One loop, that of `decoding_loop.py`, serves every model family and every way to call it:
a model owes it `config.mask_token_id`, a class attribute `logits_shift`, and a `forward` that takes `logits_to_keep`.
"""

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    PreTrainedTokenizerBase,
    StopStringCriteria,
)
from transformers.generation import BaseStreamer, LogitsProcessorList, StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import cached_file, logging

from .block_cache import ConversationCache
from .block_schedule import BlockSchedule
from .canvas import taken_apart
from .captured_step import prepare_captured_steps
from .decoding_loop import DecodingLoop, Prompt
from .draws import draw_seed
from .generation_batch import BatchGenerationMixin, process_row_by_row
from .generation_config_diffusion import (
    DEFAULTS,
    NEUTRAL_FIELDS,
    DiffusionGenerationConfig,
    refuse_argument,
    require,
)
from .generation_inputs import (
    Limits,
    answer_length,
    arguments_of_peft,
    check_adapter,
    check_conversation,
    check_inputs,
    check_objects,
    find_filter,
    warn_of_ignored,
)
from .generation_outputs import DiffusionGenerationOutput, warn_of_broken_rows
from .logits_processing import check_processors, is_positionwise, process_columns, process_positions
from .stopping import ends_by_strings, ends_in_step, ends_row_by_row, merge_ends, padded_view
from .unmasking import POLICIES
from .unmasking_filter import SUBFOLDER, UnmaskingFilter

logger = logging.get_logger(__name__)


class DiffusionGenerationMixin(BatchGenerationMixin):
    """`generate()` for masked diffusion language models. Subclass it together with `PreTrainedModel`.

    The model needs `config.mask_token_id`; `logits_shift`, 0 where the logits at position i predict token i (LLaDA), 1
    where those at i - 1 do (Dream); and `forward(input_ids, attention_mask, position_ids, logits_to_keep)`. That takes
    positions of shape `(1, L)` for all rows or `(B, L)`, and in `logits_to_keep` the places, `(K,)` or `(B, K)` for
    each row, whose logits it returns. For a `block_cache`, it also takes `past_key_values`.
    """

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
        cache_dir: Any = None,
        force_download: bool = False,
        proxies: Any = None,
        local_files_only: bool = False,
        token: Any = None,
        revision: str | None = None,
        subfolder: str | None = None,
        trust_remote_code: Any = None,
        **kwargs: Any,
    ) -> None:
        # transformers would load a plain GenerationConfig here and lose our fields.
        repository = {
            "cache_dir": cache_dir, "force_download": force_download, "proxies": proxies,
            "local_files_only": local_files_only, "token": token, "revision": revision, **kwargs,
        }  # fmt: skip
        if generation_config is not None:
            self.generation_config = DiffusionGenerationConfig(**generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            try:
                self.generation_config = DiffusionGenerationConfig.from_pretrained(
                    pretrained_model_name_or_path, subfolder=subfolder or "", **repository
                )
            except OSError:
                logger.info("No generation_config.json: decoding by the defaults and the token ids of the model.")
        if pretrained_model_name_or_path is None:
            return
        folder = "/".join(filter(None, (subfolder, SUBFOLDER)))
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
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.unmasking_filter is not None and kwargs.get("is_main_process", True):
            self.unmasking_filter.save_pretrained(Path(save_directory) / SUBFOLDER)

    @property
    def block_causal_length(self) -> int | None:
        """The length of the blocks between which attention is causal, by the model's configuration; None where it goes
        both ways everywhere, as it does in a model whose configuration does not know of blocks."""
        return getattr(self.config, "block_causal_length", None)

    def conversation_cache(self) -> ConversationCache:
        """A new cache for `generate(past_key_values=...)`, which spares the next turn of a conversation computing this
        one again.

        Raises:
            ValueError: for a model whose attention is not causal between blocks: its keys and values are never final.
        """
        if self.block_causal_length is None:
            raise ValueError(
                f"`{type(self).__name__}` attends to the whole canvas, so nothing of a turn can be kept for the next: "
                f"its configuration must have a `block_causal_length`, as SDAR's models do."
            )
        return ConversationCache(self)

    # --- settings ----------------------------------------------------------------------------------------------------

    def resolve_generation_config(
        self,
        generation_config: GenerationConfig | None = None,
        unmasking_filter: UnmaskingFilter | None = None,
        **kwargs: Any,
    ) -> DiffusionGenerationConfig:
        """The complete configuration that `generate()` goes by with these arguments: those of the call over
        `generation_config` over the checkpoint's over the defaults; a policy's threshold is its default where none is
        given for it. `steps` and `max_new_tokens` may be None where they depend on the prompt.

        Raises:
            ValueError: as `generate()` does, naming the argument, its value and what is allowed.
        """
        config, others = self._prepare_generation_config(generation_config, **kwargs)
        config.check(self.config.vocab_size, self.block_causal_length)
        for name, value in others.items():
            if value is not None:
                refuse_argument(name)
        find_filter(self, config, unmasking_filter)
        if config.threshold is None:
            config.threshold = POLICIES[config.unmasking].default
        return config

    def _prepare_generation_config(self, generation_config=None, **kwargs):
        """Arguments over `generation_config` over the checkpoint's configuration over the defaults. Returns the
        configuration and the arguments that are no field of it."""
        fields = DiffusionGenerationConfig().to_dict()
        defaults = DEFAULTS | {"mask_token_id": self.config.mask_token_id}
        if self.block_causal_length is not None:
            defaults |= {"block_length": self.block_causal_length, "block_cache": "exact"}
        settings = DiffusionGenerationConfig._get_default_generation_params() | defaults
        arguments = {name: value for name, value in kwargs.items() if name in fields}
        ok = generation_config is None or isinstance(generation_config, GenerationConfig)
        require(ok, "generation_config", generation_config, "a GenerationConfig (arguments may be given by name, too)")
        given = {} if generation_config is None else generation_config.to_dict()
        for name, value in given.items():
            if name not in fields and name not in NEUTRAL_FIELDS and value is not None:
                refuse_argument(name)
        saved = getattr(self.generation_config, "unmasking", None)
        has_policy = any(layer.get("unmasking") is not None for layer in (given, arguments))
        if arguments.get("threshold") is not None and not has_policy and saved not in (None, defaults["unmasking"]):
            logger.warning_once(
                f"`threshold={arguments['threshold']!r}` is taken as one of `unmasking={saved!r}`, the policy that "
                f"the model was saved with: numbers mean something else to each policy, so name the one you mean."
            )
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

    # --- generate ----------------------------------------------------------------------------------------------------

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
            kwargs: `attention_mask` (B, P), 0 at padding; `past_key_values`, a `conversation_cache()`, which
                this call uses and brings up to date; and any field of `DiffusionGenerationConfig`.

        Returns:
            `torch.LongTensor` of shape `(B, P + G)`, or a `DiffusionGenerationOutput` if `return_dict_in_generate`.
            With `stop_at_eos` everything behind a row's first end-of-text is `pad_token_id`; without, the canvas is
            returned as decoded.

        Raises:
            ValueError: for a wrong argument or input, before any computation.
        """
        given = {name: kwargs.pop(name, None) for name in ("input_ids", "attention_mask")}
        conversation = kwargs.pop("past_key_values", None)
        config = self.resolve_generation_config(generation_config, unmasking_filter, **kwargs)
        warn_of_ignored(config, generation_config, kwargs)
        input_ids, mask = (each.to(self.device) for each in check_inputs(self, config, inputs, **given))
        config.max_new_tokens = answer_length(Limits.of(self), config, input_ids.shape[1])
        config.max_length = input_ids.shape[1] + config.max_new_tokens
        check_objects(logits_processor, stopping_criteria, streamer, generator)
        self._prepare_special_tokens(config, given["attention_mask"] is not None, input_ids.device, len(input_ids))
        input_ids, others = self._expand_inputs_for_generation(
            expand_size=config.num_return_sequences or 1, input_ids=input_ids, attention_mask=mask
        )
        mask = others["attention_mask"]
        if streamer is not None and len(input_ids) != 1:
            raise ValueError(f"`streamer` needs a batch of 1, but `input_ids` has {len(input_ids)} rows.")
        processors = self._processors(
            config, logits_processor, input_ids.shape[1], config.max_length, mask if mask.shape[1] else None
        )
        criteria, strings, clocks = self._criteria(config, stopping_criteria, tokenizer)
        given_by_peft = arguments_of_peft(self)
        check_adapter(self, given_by_peft)
        has_own_adapters = "adapter_names" in given_by_peft
        # What a user gave may count on the rows that it was given with, as adapters do of which each row has its own.
        is_in_step = bool(criteria) or not is_positionwise(processors) or has_own_adapters
        if has_own_adapters:  # which peft chooses by the row of a batch: with a cache, there are no rows
            allowed = "'none' with `adapter_names`"
            require(config.block_cache in ("none", "exact"), "block_cache", config.block_cache, allowed)
            config.block_cache = "none"
        # Padding is no text: show what is no text either, and whose logits do not count.
        shown = input_ids.masked_fill(mask == 0, config.mask_token_id)
        if self.block_causal_length is None:
            process = partial(_process_in_step, processors, shown)
            stop = partial(ends_in_step, criteria, prompts=input_ids)
        else:  # the rows' blocks begin at other places, so they are not in step
            process = partial(process_row_by_row, partial(self._processors, config, logits_processor))
            is_in_step, stop = has_own_adapters, partial(ends_row_by_row, criteria)
        if conversation is not None:
            check_conversation(self, config, conversation, len(input_ids))
        decode, wait = self._decoder(
            config, is_in_step=is_in_step, slots=len(input_ids), width=config.max_length, processors=processors,
            process=process, stop=stop if criteria else None, strings=strings, clocks=clocks, streamer=streamer,
            synced_gpus=synced_gpus, generator=generator,
            unmasking_filter=unmasking_filter, conversation=conversation,
        )  # fmt: skip
        if streamer is not None:
            streamer.put(input_ids.cpu())
        lengths = mask.sum(dim=1).tolist()
        rows = [row[len(row) - length :] for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        kept = [0] * len(rows) if conversation is None else conversation.common(rows, config.block_length)
        prompts = [
            Prompt(i, row, config.max_new_tokens, of_row)
            for i, (row, of_row) in enumerate(zip(rows, kept, strict=True))
        ]
        output = self._collect(decode(prompts), input_ids, config)
        wait(is_done=True)
        if streamer is not None:
            streamer.end()
        return output if config.return_dict_in_generate else output.sequences

    def _collect(self, answers, input_ids, config):
        """The output of `generate()` for these prompts, from the answers as they come."""
        count, length, device = len(input_ids), config.max_new_tokens, input_ids.device
        ids = torch.full((count, length), config.mask_token_id, device=device)
        steps, confidences = torch.full_like(ids, -1), torch.zeros(count, length, device=device)
        ends, passes = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        offsets = torch.arange(length, device=device)
        for part in answers:
            rows = torch.from_numpy(part.requests).to(device)
            columns = torch.from_numpy(part.prompt_lengths).to(device)[:, None] + offsets
            parts = taken_apart(part.state)
            for whole, found in zip((ids, steps, confidences), parts, strict=True):
                whole[rows] = found.gather(1, columns)
            ends[part.requests], passes[part.requests] = part.ends - part.prompt_lengths, part.passes
        end, num_passes = torch.from_numpy(ends).to(device), torch.from_numpy(passes).to(device)
        pad = config._pad_token_tensor
        if pad is not None:
            ids = torch.where(offsets >= end[:, None], pad, ids)
        warn_of_broken_rows(confidences.isnan().any(dim=1).nonzero().flatten().tolist())
        if config._eos_token_tensor is not None:
            is_eos = torch.isin(ids, config._eos_token_tensor)
            first = torch.where(is_eos, offsets + 1, length)
            end = torch.minimum(end, first.amin(dim=1))
        return DiffusionGenerationOutput(
            sequences=torch.cat((input_ids, ids), dim=1),
            num_forward_passes=num_passes,
            tokens_per_forward=end / num_passes.clamp(min=1),
            unmasking_step=steps,
            unmasking_confidence=confidences,
        )

    # --- what both are made of ---------------------------------------------------------------------------------------

    def _decoder(
        self, config, *, is_in_step, slots, width, processors, process, stop, strings, clocks, synced_gpus, generator,
        unmasking_filter, streamer=None, device_of_answers=None, conversation=None,
    ):  # fmt: skip
        """A function from prompts to an iterator of `Answers`, and the one that waits for other processes. `process`
        calls the processors unless they take all positions at once."""
        if config._pad_token_tensor is None and (stop or strings or clocks):
            raise ValueError("`pad_token_id=None`: it must be set (or `eos_token_id`) where rows may end early.")
        unmasking_filter = find_filter(self, config, unmasking_filter)
        if unmasking_filter is not None:
            unmasking_filter = unmasking_filter.to(self.device, torch.float32).eval()
        wait = _Wait(self, synced_gpus)
        # Whatever is handed in from outside may change from step to step.
        is_fixed = not (config.disable_compile or wait.is_needed or processors)
        steps = prepare_captured_steps(self) if is_fixed else None
        if is_positionwise(processors):
            process = partial(_process_at_once, processors) if processors else None
        policy = POLICIES[config.unmasking]
        is_drawn = config.do_sample or policy.is_drawn or config.unmasking_temperature
        is_drawn = is_drawn or (policy.is_scheduled and config.schedule == "ancestral")
        seed = draw_seed(generator) if is_drawn else 0  # else the global generator stays as it is
        schedule = BlockSchedule(
            logits_shift=self.logits_shift, seed=seed, is_in_step=is_in_step,
            block_causal_length=self.block_causal_length,
            **{
                name: getattr(config, name)
                for name in (
                    "block_length", "block_cache", "cache_refresh", "cache_refresh_interval", "unmasking", "schedule",
                    "steps", "steps_per_block", "eps",
                )
            },
        )  # fmt: skip
        eos = () if config._eos_token_tensor is None or not config.stop_at_eos else config._eos_token_tensor.tolist()
        parts = [*([stop] if stop else []), *(partial(ends_by_strings, each) for each in strings)]

        def decode(prompts):
            loop = DecodingLoop(
                self, config, schedule, slots=slots, width=width, seed=seed, eos=tuple(eos), device=self.device,
                steps=steps, unmasking_filter=unmasking_filter, process=process,
                stop=merge_ends(*parts) if parts else None, clocks=clocks, streamer=streamer, wait=wait,
                device_of_answers=device_of_answers, conversation=conversation,
            )  # fmt: skip
            return loop.run(prompts)

        return decode, wait

    def _criteria(self, config, stopping_criteria, tokenizer):
        """A user's stopping criteria, those for strings, and the clocks. Length and end-of-text are the loop's own
        matter."""
        config = copy.copy(config)
        config.max_length = config._eos_token_tensor = None
        found = self._get_stopping_criteria(config, StoppingCriteriaList(stopping_criteria or []), tokenizer)
        clocks = [each for each in found if isinstance(each, MaxTimeCriteria)]
        strings = [each for each in found if type(each) is StopStringCriteria]
        return StoppingCriteriaList(each for each in found if each not in clocks + strings), strings, clocks

    def _processors(self, config, logits_processor, prompt_length, max_length, attention_mask=None):
        """Those that shape the distribution whose certainty counts, for a prompt of this length; not those that only
        shape the sampling."""
        check_processors(logits_processor, config.block_length)
        config = copy.copy(config)
        config.do_sample, config.max_length = False, max_length
        return self._get_logits_processor(
            config,
            input_ids_seq_length=prompt_length,
            logits_processor=LogitsProcessorList(logits_processor or []),
            model_kwargs={"attention_mask": attention_mask},
            device=self.device,
        )


class _Wait:
    """Keeps processes together that must make every pass together (ZeRO-3, FSDP): called before each pass, and at the
    end until all are done."""

    def __init__(self, model, synced_gpus):
        if synced_gpus is None:
            synced_gpus = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
        self.is_needed = bool(synced_gpus and dist.is_initialized() and dist.get_world_size() > 1)
        self.model = model

    def __call__(self, is_done: bool = False) -> None:
        if self.is_needed and not is_done:
            self.model._has_unfinished_sequences(False, True, self.model.device)
        while self.is_needed and is_done and self.model._has_unfinished_sequences(True, True, self.model.device):
            ids = torch.full((1, 1), self.model.config.mask_token_id, device=self.model.device)
            self.model(input_ids=ids)  # only so that the other processes can gather their weights


def _process_at_once(processors, loop, plan, logits):
    return process_positions(processors, logits)


def _process_in_step(processors, prompts, loop, plan, logits):
    first = prompts.shape[1] + int(plan.start[0] - loop.rows.prompt_length[0])
    return process_columns(processors, logits, padded_view(loop.canvas, loop.rows, prompts), first)
