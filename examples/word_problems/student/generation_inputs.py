# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""What `generate()` and its like are given beside their configuration, checked before any computation."""

import math
import operator
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .block_cache import ConversationCache
from .generation_config_diffusion import DEFAULT_MAX_NEW_TOKENS, DiffusionGenerationConfig, require

logger = logging.get_logger(__name__)


def check_inputs(
    model: PreTrainedModel,
    config: DiffusionGenerationConfig,
    inputs: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The prompts of `generate()`, padded on the left, and which of their tokens are no padding, both (B, P)."""
    # Without a prompt the answer follows the beginning of text, as everywhere in transformers.
    is_empty = inputs is None and input_ids is None and config.bos_token_id is not None
    if not is_empty and (inputs is None) == (input_ids is None):
        raise ValueError(
            "Exactly one of `inputs` and `input_ids` must be given, token ids of shape (B, P); or neither, if "
            "`bos_token_id` is set."
        )
    input_ids = inputs if input_ids is None else input_ids
    if is_empty:
        input_ids = torch.tensor([[config.bos_token_id]], device=model.device)
    if isinstance(input_ids, Mapping) or hasattr(input_ids, "input_ids"):
        raise ValueError(
            f"`inputs` is a {type(input_ids).__name__}, as tokenizers return it: it must be unpacked, "
            f"`generate(**inputs)`."
        )
    is_tensor = isinstance(input_ids, torch.Tensor)
    if not is_tensor or input_ids.ndim != 2 or input_ids.dtype not in (torch.long, torch.int):
        got = f"{input_ids.dtype} of {tuple(input_ids.shape)}" if is_tensor else type(input_ids).__name__
        raise ValueError(
            f"`input_ids` must be an integer tensor of shape (B, P), but got {got}. Lists of token ids are for "
            f"`generate_batch()`."
        )
    input_ids = input_ids.long()
    vocab_size = model.config.vocab_size
    if ((input_ids < 0) | (input_ids >= vocab_size)).any():
        low, high = input_ids.min().item(), input_ids.max().item()
        raise ValueError(f"`input_ids` holds ids from {low} to {high}: they must be from 0 to {vocab_size - 1}.")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else _check_mask(attention_mask, input_ids)
    if ((input_ids == config.mask_token_id) & (attention_mask == 1)).any():
        raise ValueError(
            f"`input_ids` holds `mask_token_id={config.mask_token_id}`: a prompt must not contain [MASK]."
        )
    if model.logits_shift and (input_ids.shape[1] == 0 or not attention_mask[:, -1].all()):
        raise ValueError("`input_ids` has a row without a token: this model predicts from the token before.")
    return input_ids, attention_mask


def _check_mask(attention_mask, input_ids):
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
    return attention_mask


class Limits(NamedTuple):
    """What a model asks of prompts, looked up once for all of them: attributes of its configuration are slow to read.

    Token ids are below `vocab_size`, a prompt with its answer has at most `positions` tokens, and `is_empty_allowed`
    says whether a prompt may have none.
    """

    vocab_size: int
    positions: float
    is_empty_allowed: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Limits":
        positions = getattr(model.config, "max_position_embeddings", None) or math.inf
        return cls(model.config.vocab_size, positions, not model.logits_shift)


def check_prompt(limits: Limits, config: DiffusionGenerationConfig, prompt: Any, index: int) -> list[int]:
    """One prompt of `generate_batch()`, a list or a one-dimensional tensor of token ids, as a list."""
    name = f"inputs[{index}]"
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.tolist()
    try:
        ids = list(map(operator.index, prompt or []))
        is_list = not isinstance(prompt, (str, bytes)) and bool not in set(map(type, prompt or []))
    except TypeError:  # text, or what else is no integer
        is_list = False
    if not is_list:
        hint = ', such as its `["input_ids"]`' if hasattr(prompt, "keys") else ""
        raise ValueError(f"`{name}` is {_shortened(prompt)}: it must be a list of token ids{hint}.")
    if not ids and (not limits.is_empty_allowed or config.bos_token_id is None):
        raise ValueError(f"`{name}` is empty: it must hold at least one token.")
    ids = ids or [config.bos_token_id]
    low, high = min(ids), max(ids)
    if low < 0 or high >= limits.vocab_size:
        raise ValueError(f"`{name}` holds ids from {low} to {high}: they must be from 0 to {limits.vocab_size - 1}.")
    if config.mask_token_id in ids:
        raise ValueError(f"`{name}` holds `mask_token_id={config.mask_token_id}`: a prompt must not contain [MASK].")
    return ids


def _shortened(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def answer_length(limits: Limits, config: DiffusionGenerationConfig, prompt_length: int) -> int:
    """How many tokens the answer to a prompt of this length gets."""
    length = config.max_new_tokens
    if length is None and config.max_length is None:
        length = max(min(DEFAULT_MAX_NEW_TOKENS, limits.positions - prompt_length), 1)
    elif length is None:
        length = config.max_length - prompt_length
        require(length > 0, "max_length", config.max_length, f"above the prompt length, {prompt_length}")
    if prompt_length + length > limits.positions:
        raise ValueError(
            f"A prompt of {prompt_length} tokens and `max_new_tokens={length}` make {prompt_length + length}: "
            f"together they must be at most `config.max_position_embeddings={limits.positions}`."
        )
    return length


def arguments_of_peft(model: PreTrainedModel) -> set[str]:
    """What peft gives to each of its layers during this call, by hooks: `adapter_names`, for example."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return {name for hook in hooks if isinstance(hook, partial) for name in hook.keywords}


def check_adapter(model: PreTrainedModel, given_by_hooks: set[str]) -> None:
    """Refuse adapters that count on tokens coming one after the other: a learned prompt, which peft hands to
    `prepare_inputs_for_generation`, and aLoRA, which counts positions from the end of the text."""
    adapted = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    adapter = getattr(adapted, "active_peft_config", None)
    has_prompt = adapter is not None and adapter.is_prompt_learning
    if has_prompt or "alora_offsets" in given_by_hooks:
        kind = adapter.peft_type.value if has_prompt else "aLoRA"  # type: ignore[union-attr]
        raise ValueError(
            f"The adapter is of the kind {kind}, which `generate()` does not support: it must be one that changes "
            f"weights in all positions, such as LoRA."
        )


def warn_of_ignored(config: DiffusionGenerationConfig, given: Any, arguments: Mapping[str, Any]) -> None:
    """Warn of what was given by a configuration or as an argument and has no effect."""
    for name, why in config.ignored().items():
        if name in arguments or getattr(given, name, None) is not None:
            logger.warning(f"`{name}` is ignored: {why}.")
    if arguments.get("use_cache"):  # files have it, and mean autoregressive decoding
        logger.warning("`use_cache` is ignored: `block_cache` says what is kept from pass to pass.")


def check_conversation(
    model: PreTrainedModel, config: DiffusionGenerationConfig, conversation: Any, num_rows: int
) -> None:
    """Refuse a `past_key_values` that cannot serve a call with so many rows."""
    if not isinstance(conversation, ConversationCache):
        raise ValueError(
            f"`past_key_values` is a {type(conversation).__name__}: it must come from `model.conversation_cache()`."
        )
    if config.block_cache != "exact":
        raise ValueError(
            f"`past_key_values` is given with `block_cache={config.block_cache!r}`: it must be left out, as keys and "
            f"values are final only where attention is causal between blocks and the cache is 'exact'."
        )
    if conversation.model() is not model:
        raise ValueError("`past_key_values` comes from another model: it must be of the model that decodes.")
    if len(conversation.ids) not in (0, num_rows):
        raise ValueError(
            f"`past_key_values` holds {len(conversation.ids)} rows, but there are {num_rows} prompts: it must hold as "
            f"many, in the same order, or be new."
        )


def check_objects(logits_processor: Any, stopping_criteria: Any, streamer: Any, generator: Any) -> None:
    """Refuse what is not of the kind that is wanted."""
    for name, value in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
        ok = value is None or (isinstance(value, (list, tuple)) and all(map(callable, value)))
        require(ok, name, value, "a list of callables")
    ok = streamer is None or (hasattr(streamer, "put") and hasattr(streamer, "end"))
    require(ok, "streamer", streamer, "an object with `put` and `end`")
    ok = generator is None or isinstance(generator, torch.Generator)
    require(ok, "generator", generator, "a torch.Generator")


def find_filter(model: PreTrainedModel, config: DiffusionGenerationConfig, unmasking_filter: Any) -> Any:
    """The filter to decode by, or None."""
    if config.unmasking != "learned_filter":
        allowed = f"left out with `unmasking={config.unmasking!r}`, which has no filter"
        require(unmasking_filter is None, "unmasking_filter", unmasking_filter, allowed)
        return None
    if unmasking_filter is None:
        unmasking_filter = model.unmasking_filter
    # Not by its class: that of remote code is another one.
    ok = getattr(getattr(unmasking_filter, "config", None), "model_type", None) == "unmasking_filter"
    allowed = "an UnmaskingFilter with `unmasking='learned_filter'`, as the checkpoint has none of its own"
    require(ok, "unmasking_filter", unmasking_filter, allowed)
    length = unmasking_filter.config.block_length
    allowed = f"{length}, as the filter was trained for blocks of that length"
    require(config.block_length == length, "block_length", config.block_length, allowed)
    return unmasking_filter
