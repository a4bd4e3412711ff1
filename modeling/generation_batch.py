# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Answering many prompts: a batch that is kept full, as in transformers' continuous batching."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from .decoding_loop import Prompt
from .generation_config_diffusion import require
from .generation_inputs import (
    Limits,
    answer_length,
    arguments_of_peft,
    check_adapter,
    check_objects,
    check_prompt,
    warn_of_ignored,
)
from .generation_outputs import DiffusionRequestOutput, failed_output, to_outputs
from .logits_processing import process_columns
from .stopping import ends_row_by_row
from .unmasking_filter import UnmaskingFilter

DEFAULT_BATCH_SIZE = 64


class BatchGenerationMixin(GenerationMixin):
    """`generate_batch()` and `generate_each()` of `DiffusionGenerationMixin`."""

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Any = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        *,
        max_batch_size: int = DEFAULT_BATCH_SIZE,
        **kwargs: Any,
    ) -> dict[str, DiffusionRequestOutput]:
        """Answer a list of prompts of any lengths, `max_batch_size` at a time. The batch is kept full: when a row
        ends, the next prompt takes its place while the next pass is made, and joins in the one after. Long prompts
        begin first. This is transformers' call for continuous batching; of its arguments `continuous_batching_config`,
        `record_timestamps` and `persistent_manager` have no meaning here and are refused, and `warmup` is ignored, as
        there is nothing to warm.

        Answers and NFE are those of `generate()`, whatever else is in the batch, up to the rounding of floating-point
        sums. What is drawn depends on the seed, the prompt's index, the pass and the position alone.

        Memory is bounded by `max_batch_size` rows of the longest prompt with its answer: their logits, and with
        `block_cache` their keys and values. Where a GPU has too little for that, rows begin again, half as many at a
        time, with a warning.

        Args:
            inputs (list of lists of `int`): prompts as token ids, without padding.
            generation_config (`GenerationConfig`, *optional*): as in `generate()`.
            progress_bar (`bool`, defaults to `False`): show how many prompts are answered.
            max_batch_size (`int`, defaults to 64): rows that are decoded at the same time.
            kwargs: what else `generate_each()` takes.

        Returns:
            `dict[str, DiffusionRequestOutput]`: request ids `"req_0"`, `"req_1"`, ... in the order of `inputs` to
            outputs; `{}` for no inputs. With `num_return_sequences=n` each prompt has n - 1 more,
            `"req_0__child#0"`, ..., before its own.

        Raises:
            ValueError: for a wrong argument, or a prompt that cannot be decoded, whose index it names, before any
                computation.
        """
        for name, value in (
            ("continuous_batching_config", continuous_batching_config),
            ("record_timestamps", record_timestamps),
            ("persistent_manager", persistent_manager),
        ):
            require(not value, name, value, "left out: it is for autoregressive decoding")
        if not isinstance(inputs, (list, tuple)):
            raise _not_prompts(inputs, "a list of lists of token ids")
        if not inputs:
            return {}
        found = {}
        with tqdm(total=len(inputs), disable=not progress_bar, desc="Answering", unit="prompt") as progress:
            for output in self.generate_each(inputs, generation_config, max_batch_size=max_batch_size, **kwargs):
                found[output.request_id] = output
                progress.update("child" not in output.request_id)
        child = {name: int(name.rpartition("#")[2]) if "#" in name else len(found) for name in found}
        return {name: found[name] for name in sorted(found, key=lambda name: (found[name].index, child[name]))}

    def generate_each(
        self,
        inputs: Iterable[list[int]],
        generation_config: GenerationConfig | None = None,
        *,
        max_batch_size: int = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        synced_gpus: bool | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generator: torch.Generator | None = None,
        unmasking_filter: UnmaskingFilter | None = None,
        **kwargs: Any,
    ) -> Iterator[DiffusionRequestOutput]:
        """Answer prompts as `generate_batch()` does, and yield each answer as soon as it is there, in whatever order
        rows end; `output.index` says which prompt it belongs to.

        Args:
            inputs (iterable of lists of `int`): prompts as token ids. A list is checked as a whole before any
                computation, and begun with its longest prompts. Of any other iterable, the next prompt is taken when a
                row is free for it, so it may be endless; one that cannot be decoded gives an output with an `error`,
                and harms no other.
            generation_config, synced_gpus, tokenizer, generator, unmasking_filter: as in `generate()`. With
                synchronised processes, which make every pass together, answers are yielded when all processes have all
                of theirs.
            max_batch_size (`int`, defaults to 64): rows that are decoded at the same time. Memory is bounded by that
                many rows of `max_length` tokens.
            max_length (`int`, *optional*): tokens of the longest prompt with its answer. For a list it is found; any
                other iterable needs it, and longer ones get an `error`.
            logits_processor, stopping_criteria: as in `generate()`, but called for one row at a time, with ids (1, L)
                and logits (1, V).
            kwargs: any field of `DiffusionGenerationConfig`. With `max_time`, rows end at that time with what is
                decided of them, and prompts that have not begun get an `error`.

        Raises:
            ValueError: for a wrong argument, or a prompt of a list that cannot be decoded, whose index it names,
                before any computation.
        """
        config = self.resolve_generation_config(generation_config, unmasking_filter, **kwargs)
        warn_of_ignored(config, generation_config, kwargs)
        ok = isinstance(max_batch_size, int) and not isinstance(max_batch_size, bool) and max_batch_size >= 1
        require(ok, "max_batch_size", max_batch_size, "an integer of at least 1")
        if not isinstance(inputs, Iterable) or isinstance(inputs, (str, bytes, Mapping, torch.Tensor)):
            raise _not_prompts(inputs, "an iterable of lists of token ids")
        check_objects(logits_processor, stopping_criteria, None, generator)
        check_adapter(self, arguments_of_peft(self))
        self._prepare_special_tokens(config, True, self.device, 1)
        make = partial(_make_prompt, Limits.of(self), config, max_length)
        prompts: Iterable[Any]
        count = config.num_return_sequences or 1
        if isinstance(inputs, (list, tuple)):
            listed = [make(prompt, index) for index, prompt in enumerate(inputs)]
            width = max((len(each.ids) + each.length for each in listed), default=1)
            slots = min(max_batch_size, len(listed) * count)
            prompts = sorted(listed, key=lambda each: -len(each.ids))
        else:
            width, slots = max_length or config.max_length, max_batch_size
            allowed = "the tokens of the longest prompt with its answer, where `inputs` is no list"
            require(width is not None, "max_length", None, allowed)
            prompts = _checked(inputs, make)
        return self._answer(
            prompts, isinstance(inputs, (list, tuple)), config, slots, width, logits_processor, stopping_criteria,
            tokenizer, synced_gpus, generator, unmasking_filter,
        )  # fmt: skip

    def _answer(
        self, prompts, is_list, config, slots, width, logits_processor, stopping_criteria, tokenizer, synced_gpus,
        generator, unmasking_filter,
    ):  # fmt: skip
        """Checks what is left to be checked, and returns the generator of outputs."""
        count = config.num_return_sequences or 1
        make_processors = partial(self._processors, config, logits_processor)
        processors = make_processors(1, width)
        criteria, strings, clocks = self._criteria(config, stopping_criteria, tokenizer)
        decode, wait = self._decoder(
            config, is_in_step=False, slots=slots, width=width, processors=processors,
            process=partial(process_row_by_row, make_processors),
            stop=partial(ends_row_by_row, criteria) if criteria else None,
            strings=strings, clocks=clocks, synced_gpus=synced_gpus, generator=generator,
            unmasking_filter=unmasking_filter, device_of_answers=torch.device("cpu"),
        )  # fmt: skip

        @torch.no_grad()
        def outputs():
            failed, begun = [], {}

            def admitted():
                for prompt in prompts:
                    if isinstance(prompt, DiffusionRequestOutput):
                        failed.append(prompt)
                        continue
                    for number in range(count):
                        begun[prompt.request * count + number] = prompt
                        yield Prompt(prompt.request * count + number, prompt.ids, prompt.length)

            source = admitted()
            for part in decode(source):
                yield from failed
                failed.clear()
                yield from to_outputs(part, begun, count, config)
            yield from failed
            for _ in source if is_list else ():  # what `max_time` has left over
                pass
            for request, prompt in begun.items():
                yield failed_output(request, count, prompt.ids, "`max_time` was over before it began.")
            wait(is_done=True)

        return iter(list(outputs())) if wait.is_needed else outputs()

    def _refuse_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "transformers' continuous batching decodes one token after the other, which is not how this model works: "
            "call `generate_batch()`, or `generate_each()` for prompts that come one by one."
        )

    init_continuous_batching = continuous_batching_context_manager = _refuse_continuous_batching
    destroy_cached_continuous_batching_manager = _refuse_continuous_batching


def process_row_by_row(make_processors: Callable, loop: Any, plan: Any, logits: torch.Tensor) -> torch.Tensor:
    """Logits (R, K, V) of a pass as processors leave them that are made for a prompt's and a row's length, and called
    for one row at a time."""
    slots, starts = plan.slot.tolist(), plan.start.tolist()
    rows = []
    for slot, start, row in zip(slots, starts, logits, strict=True):
        prompt_length, length = int(loop.rows.prompt_length[slot]), int(loop.rows.length[slot])
        processors = make_processors(prompt_length, prompt_length + length)
        rows.append(process_columns(processors, row[None], loop.canvas.ids[slot : slot + 1], start))
    return torch.cat(rows)


def _not_prompts(inputs, wanted):
    return ValueError(
        f"`inputs` is a {type(inputs).__name__}: it must be {wanted}, without padding, such as the 'input_ids' that a "
        f"tokenizer gives for a list of texts if it is not asked for tensors."
    )


def _make_prompt(limits, config, max_length, prompt, index):
    ids = check_prompt(limits, config, prompt, index)
    try:
        length = answer_length(limits, config, len(ids))
        if max_length is not None:
            allowed = f"at least {len(ids) + length}, the tokens of the prompt and its answer"
            require(len(ids) + length <= max_length, "max_length", max_length, allowed)
    except ValueError as error:
        raise ValueError(f"`inputs[{index}]`: {error}") from None
    return Prompt(index, ids, length)


def _checked(inputs, make):
    """Prompts, or outputs of those that cannot be decoded."""
    for index, prompt in enumerate(inputs):
        try:
            yield make(prompt, index)
        except ValueError as error:
            yield failed_output(index, 1, list(prompt) if isinstance(prompt, (list, tuple)) else [], str(error))
