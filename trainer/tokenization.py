"""Rows of a dataset to tokens: a prompt, and a response that is learned."""

import hashlib

from accelerate.logging import get_logger
from trl import is_conversational, maybe_apply_chat_template

logger = get_logger(__name__)

DATASET_FORMATS = (("prompt", "completion"), ("messages",), ("text",), ("input_ids", "prompt_length"))


def prepare_example(example, index=None, *, tokenizer, max_length, response_length, mask_token_id, name):
    """A row of a dataset to `input_ids`, `prompt_length` and `example_id`. In a stream, where an index would differ
    from worker to worker, the id is a hash of the tokens."""
    if {"input_ids", "prompt_length"} <= set(example):
        row = lay_out_tokens(example, tokenizer.eos_token_id, max_length, response_length)
    else:
        row = tokenize_example(example, tokenizer, max_length, response_length)
    if mask_token_id in row["input_ids"]:
        raise ValueError(f"`{name}` has an example with the mask token, id {mask_token_id}: {example}.")
    if index is None:
        index = int.from_bytes(hashlib.blake2b(repr(row["input_ids"]).encode(), digest_size=7).digest(), "big")
    own = example.get("example_id")  # of trajectories; another dataset's may be text
    return {**row, "example_id": own if isinstance(own, int) else index}


def has_response(row, counts=None, name=None):
    """Filter of prepared rows. Of a stream, it counts and says at 1, 2, 4, 8, ... how many it dropped."""
    keep = row["prompt_length"] < len(row["input_ids"])
    if counts is not None:
        counts["seen"] += 1
        counts["dropped"] += not keep
        if not keep and counts["dropped"] & (counts["dropped"] - 1) == 0:
            logger.warning(f"`{name}`: {counts['dropped']} of {counts['seen']} examples dropped, without a response.")
    return keep


def tokenize_example(example, tokenizer, max_length=None, response_length=None):
    """One row of a dataset to `input_ids` and `prompt_length`. The response ends with end-of-text, and is filled up
    with it to `response_length` tokens, or to `max_length` for prompt and response; `text` is not filled up."""
    if "messages" in example:
        *prompt, answer = example["messages"]
        if answer["role"] != "assistant":
            raise ValueError(f"`messages` must end with the assistant's, but the last role is {answer['role']!r}.")
        if not prompt:
            raise ValueError("`messages` holds the assistant's answer alone: something must be asked before it.")
        example = {"prompt": prompt, "completion": [answer]}
    eos = tokenizer.eos_token_id
    if not {"prompt", "completion"} <= set(example):
        ids = [*tokenizer(example["text"])["input_ids"], eos]
        return {"input_ids": ids[:max_length], "prompt_length": 0}
    if (
        not example["prompt"]
        or not example["completion"]
        or type(example["prompt"]) is not type(example["completion"])
    ):
        raise ValueError(
            f"`prompt` and `completion` must both be text, or both messages, and not empty, in {example}."
        )
    # A chat template writes its own special tokens.
    add_special_tokens = not is_conversational(example)
    example = maybe_apply_chat_template({key: example[key] for key in ("prompt", "completion")}, tokenizer)
    prompt = tokenizer(example["prompt"], add_special_tokens=add_special_tokens)["input_ids"]
    response = [*tokenizer(example["completion"], add_special_tokens=False)["input_ids"], eos]
    row = {"input_ids": [*prompt, *response], "prompt_length": len(prompt)}
    return lay_out_tokens(row, eos, max_length, response_length)


def tokenize_prompt(prompt, tokenizer):
    """Text or messages to the token ids that an answer is written behind: the prompt of `tokenize_example`."""
    if not prompt:
        raise ValueError(f"`prompt={prompt!r}` is empty: it must be text or messages.")
    add_special_tokens = not is_conversational({"prompt": prompt})
    text = maybe_apply_chat_template({"prompt": prompt}, tokenizer)["prompt"]
    return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]


def lay_out_tokens(row, eos_token_id, max_length=None, response_length=None):
    """Cut `input_ids` to its lengths, and fill a response that ends with end-of-text up with it. `unmasking_step`, one
    number for each response token, becomes one for each token, -1 where the teacher wrote nothing."""
    ids, start = row["input_ids"], row["prompt_length"]
    length = response_length or (max_length or 0) - start
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


def padding_share(rows, eos_token_id) -> float:
    """The share of the response tokens of prepared rows that fill them up: end-of-text behind the first one."""
    learned = filled = 0
    for row in rows:
        response = row["input_ids"][row["prompt_length"] :]
        learned += len(response)
        filled += max(next((i for i, token in enumerate(reversed(response)) if token != eos_token_id), 0) - 1, 0)
    return filled / learned
