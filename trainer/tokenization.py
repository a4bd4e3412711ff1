"""Rows of a dataset to tokens: a prompt, and a response that is learned."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import apply_chat_template, is_conversational

logger = get_logger(__name__)
row_logger = logging.get_logger(__name__)  # for what is said of rows, also in processes that accelerate did not start

DATASET_FORMATS = (("prompt", "completion"), ("messages",), ("text",), ("input_ids", "prompt_length"))


def prepare_example(
    example: dict[str, Any],
    index: int | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    response_length: int | None,
    mask_token_id: int,
    name: str,
    block_causal_length: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """A row of a dataset to `input_ids`, `prompt_length` and `example_id`. In a stream, where an index would differ
    from worker to worker, the id is a hash of the tokens. `limit`: tokens that the model can read."""
    lengths = max_length, response_length, block_causal_length, limit
    if {"input_ids", "prompt_length"} <= set(example):
        row = lay_out_tokens(example, tokenizer.eos_token_id, *lengths)
    else:
        row = tokenize_example(example, tokenizer, *lengths)
    if limit is not None and len(row["input_ids"]) > limit:
        raise ValueError(
            f"`{name}` has an example of {len(row['input_ids'])} tokens, but the model reads at most {limit} "
            f"(`config.max_position_embeddings`): `max_length={max_length}` must be at most that."
        )
    if mask_token_id in row["input_ids"]:
        raise ValueError(f"`{name}` has an example with the mask token, id {mask_token_id}: {example}.")
    if index is None:
        index = int.from_bytes(hashlib.blake2b(repr(row["input_ids"]).encode(), digest_size=7).digest(), "big")
    own = example.get("example_id")  # of trajectories; another dataset's may be text
    return {**row, "example_id": own if isinstance(own, int) else index}


def has_response(
    row: dict[str, Any], logits_shift: int = 0, counts: dict[str, int] | None = None, name: str | None = None
) -> bool:
    """Filter of prepared rows. With a `logits_shift` of 1, nothing predicts a row's first token. Of a stream, the
    filter counts and says at 1, 2, 4, 8, ... how many it dropped."""
    keep = max(row["prompt_length"], logits_shift) < len(row["input_ids"])
    if counts is not None:
        counts["seen"] += 1
        counts["dropped"] += not keep
        if not keep and counts["dropped"] & (counts["dropped"] - 1) == 0:
            logger.warning(f"`{name}`: {counts['dropped']} of {counts['seen']} examples dropped, without a response.")
    return keep


def tokenize_example(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    response_length: int | None = None,
    block_causal_length: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """One row of a dataset to `input_ids` and `prompt_length`. The response ends with end-of-text, and is filled up
    with it, see `lay_out_tokens`; `text` is not filled up."""
    if "messages" in example:
        if not example["messages"] or not is_conversational({"messages": example["messages"]}):
            raise ValueError(f"`messages={example['messages']!r}` is not allowed: it must be a list of messages.")
        *prompt, answer = example["messages"]
        if answer["role"] != "assistant":
            raise ValueError(f"`messages` must end with the assistant's, but the last role is {answer['role']!r}.")
        if not prompt:
            raise ValueError("`messages` holds the assistant's answer alone: something must be asked before it.")
        example = {**example, "prompt": prompt, "completion": [answer]}
    eos = tokenizer.eos_token_id
    if not {"prompt", "completion"} <= set(example):
        ids = [*tokenizer(_as_text(example, ("text",), tokenizer)[0]["text"])["input_ids"], eos]
        return {"input_ids": ids[:max_length], "prompt_length": 0}
    if (
        not example["prompt"]
        or not example["completion"]
        or type(example["prompt"]) is not type(example["completion"])
    ):
        raise ValueError(
            f"`prompt` and `completion` must both be text, or both messages, and not empty, in {example}."
        )
    text, add_special_tokens = _as_text(example, ("prompt", "completion"), tokenizer)
    prompt = tokenizer(text["prompt"], add_special_tokens=add_special_tokens)["input_ids"]
    response = [*tokenizer(text["completion"], add_special_tokens=False)["input_ids"], eos]
    row = {"input_ids": [*prompt, *response], "prompt_length": len(prompt)}
    return lay_out_tokens(row, eos, max_length, response_length, block_causal_length, limit)


def tokenize_prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A row with `prompt` or `messages` to the token ids that an answer is written behind: the prompt of
    `tokenize_example`. Of `messages`, the last one is the answer."""
    prompt = row["prompt"] if row.get("prompt") or "messages" not in row else row["messages"][:-1]
    if not prompt:
        raise ValueError(f"`prompt={prompt!r}` is empty: it must be text or messages.")
    text, add_special_tokens = _as_text({**row, "prompt": prompt}, ("prompt",), tokenizer)
    return tokenizer(text["prompt"], add_special_tokens=add_special_tokens)["input_ids"]


def _as_text(row, columns, tokenizer):
    """Of a row, the text of some columns, and whether the tokenizer is to add its special tokens. Messages become what
    TRL makes of them, by the chat template (which writes its own special tokens), with the columns `tools` and
    `chat_template_kwargs`."""
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs") or {}
    tools = json.loads(tools) if isinstance(tools, str) else tools  # as TRL allows
    if not is_conversational({columns[0]: row[columns[0]]}):
        for name, value in (("tools", tools), ("chat_template_kwargs", kwargs)):
            if value:
                raise ValueError(
                    f"`{name}` is not allowed beside text: a chat template shows it, so that `{columns[0]}` must be "
                    f"messages."
                )
        return row, True
    for name, where in (("documents", "in `chat_template_kwargs`"), ("image", "left out"), ("images", "left out")):
        if row.get(name):
            raise ValueError(f"`{name}` is not allowed beside messages, which would not show it: it must be {where}.")
    if tools and "tools" not in tokenizer.get_chat_template(kwargs.get("chat_template"), tools):
        row_logger.warning_once("The chat template of `processing_class` does not show the `tools` of the rows.")
    messages = {name: row[name] for name in columns} | {"chat_template_kwargs": kwargs}
    return apply_chat_template(messages, tokenizer, tools), False


def lay_out_tokens(
    row: dict[str, Any],
    eos_token_id: int,
    max_length: int | None = None,
    response_length: int | None = None,
    block_causal_length: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Cut `input_ids` to its lengths, and fill a response that ends with end-of-text up with it: to `response_length`
    tokens; or else to `max_length` for prompt and response, or, for a block-causal model, which decodes no block
    behind its end-of-text, to the end of the block or to the `limit` of what the model reads. `unmasking_step`, one
    number for each response token, becomes one for each token, -1 where the teacher wrote nothing."""
    ids, start = row["input_ids"], row["prompt_length"]
    width = max_length or 0
    if block_causal_length is not None:
        width = -(-len(ids) // block_causal_length) * block_causal_length
        width = width if limit is None else min(width, limit)
    length = response_length or width - start
    fill = length - (len(ids) - start) if 0 < start < len(ids) and ids[-1] == eos_token_id else 0
    stop = start + response_length if response_length else None
    result = {"input_ids": [*ids, *[eos_token_id] * fill][:stop][:max_length], "prompt_length": start}
    if "unmasking_step" in row:
        steps = [-1] * start + list(row["unmasking_step"])
        result["unmasking_step"] = (steps + [-1] * fill)[: len(result["input_ids"])]
        if len(result["unmasking_step"]) != len(result["input_ids"]):
            raise ValueError(
                f"`unmasking_step` has {len(row['unmasking_step'])} numbers for {len(ids) - start} response tokens: "
                f"it must have one for each."
            )
    return result


def padding_share(rows: Iterable[dict[str, Any]], eos_token_id: int) -> float:
    """The share of the response tokens of prepared rows that fill them up: end-of-text behind the first one."""
    learned = filled = 0
    for row in rows:
        response = row["input_ids"][row["prompt_length"] :]
        learned += len(response)
        filled += max(next((i for i, token in enumerate(reversed(response)) if token != eos_token_id), 0) - 1, 0)
    return filled / learned
