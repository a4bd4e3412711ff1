"""Trajectories: what generate() gives, for every prompt, in order."""

import json

import pytest
import torch
from datasets import Dataset

from dparallel.trainer import generate_trajectories
from dparallel.trainer.tokenization import lay_out_tokens, tokenize_example
from dparallel.trainer.trajectories import model_digest, tensor_checksum

SETTINGS = {"max_new_tokens": 32, "unmasking": "confidence_threshold", "threshold": 0.9}


def prompts(count=7):
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Sam has {i} books. " * (1 + i % 3) + "Sam buys 4 more."}],
                "n": i,
            }
            for i in range(count)
        ]
    )


def test_rows_are_those_of_generate(reader, word_tokenizer, tmp_path):
    rows = generate_trajectories(
        reader, word_tokenizer, prompts(), tmp_path, lambda row: row["n"] % 2 == 0 and bool(row["response"]),
        batch_size=3, shard_size=4, seed=5, **SETTINGS,
    )  # fmt: skip
    assert rows["n"][:] == list(range(7)) and rows["example_id"][:] == list(range(7))
    assert rows["correct"][:] == [True, False] * 3 + [True]
    for row in rows:
        ids = word_tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        output = reader.generate(ids, return_dict_in_generate=True, **SETTINGS)
        assert row["prompt_length"] == ids.shape[1]
        length = len(row["input_ids"]) - row["prompt_length"]
        assert row["input_ids"] == output.sequences[0, : ids.shape[1] + length].tolist()
        answer = output.sequences[0, ids.shape[1] :]
        assert (answer[length:] == word_tokenizer.eos_token_id).all()
        assert word_tokenizer.eos_token_id not in answer[: length - 1]
        assert row["unmasking_step"] == output.unmasking_step[0, :length].tolist()
        assert row["num_forward_passes"] == output.num_forward_passes.item()
        assert row["response"] == word_tokenizer.decode(answer, skip_special_tokens=True)
        assert row["seed"] == 5 and json.loads(row["settings"]) == SETTINGS


def test_tools_are_in_the_prompt(reader, word_tokenizer, tmp_path, monkeypatch):
    """And a student that learns the answer sees them as its teacher did."""
    monkeypatch.setattr(
        word_tokenizer, "chat_template",
        "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )  # fmt: skip
    row = {"prompt": [{"role": "user", "content": "Sam has 3 ."}], "tools": [{"name": "books"}]}
    (found,) = generate_trajectories(reader, word_tokenizer, Dataset.from_list([row]), tmp_path, **SETTINGS)
    prompt = found["input_ids"][: found["prompt_length"]]
    assert prompt == word_tokenizer("books Sam has 3 . ")["input_ids"]
    example = {**row, "completion": [{"role": "assistant", "content": "So 3 ."}]}
    assert tokenize_example(example, word_tokenizer)["input_ids"][: len(prompt)] == prompt


def test_one_token_a_pass_by_default(reader, word_tokenizer, tmp_path):
    row = generate_trajectories(reader, word_tokenizer, prompts(1), tmp_path, max_new_tokens=8)[0]
    assert sorted(row["unmasking_step"]) == list(range(8)) and row["correct"] is None


def test_answers_are_as_long_as_the_teacher_was_saved_with(reader, word_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(reader.generation_config, "max_new_tokens", 8)
    row = generate_trajectories(reader, word_tokenizer, prompts(1), tmp_path, stop_at_eos=False)[0]
    assert len(row["unmasking_step"]) <= 8 and json.loads(row["settings"])["max_new_tokens"] == 8


def test_a_broken_run_goes_on(reader, word_tokenizer, tmp_path, monkeypatch):
    settings = {**SETTINGS, "do_sample": True, "temperature": 1.5, "shard_size": 2}
    expected = generate_trajectories(reader, word_tokenizer, prompts(), tmp_path / "a", **settings)
    answers, decode = [], type(reader).generate_batch

    def fails_at_the_third(self, *args, **kwargs):
        if len(answers) == 2:
            raise KeyboardInterrupt
        answers.append(1)
        return decode(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(reader), "generate_batch", fails_at_the_third)
        generate_trajectories(reader, word_tokenizer, prompts(), tmp_path / "b", **settings)
    rows = generate_trajectories(reader, word_tokenizer, prompts(), tmp_path / "b", **settings)
    assert rows.to_list() == expected.to_list()
    other = generate_trajectories(reader, word_tokenizer, prompts(), tmp_path / "c", **settings, seed=1)
    assert other["input_ids"][:] != expected["input_ids"][:]


def test_columns_that_are_carried_along_may_be_empty(reader, word_tokenizer, tmp_path):
    """In one shard and not in the other."""
    rows = [{"prompt": "Sam has 3.", "n": None, "x": {"a": None}}, {"prompt": "Sam has 4.", "n": 1.5, "x": {"a": [1]}}]
    result = generate_trajectories(reader, word_tokenizer, Dataset.from_list(rows), tmp_path, shard_size=1, **SETTINGS)
    assert result["n"][:] == [None, 1.5] and result["x"][:] == [{"a": None}, {"a": [1]}]


def test_changes_are_noticed(family, reader, word_tokenizer, tmp_path):
    def run(model=reader, rows=None, **changes):
        return generate_trajectories(model, word_tokenizer, rows or prompts(), tmp_path, **(SETTINGS | changes))

    first = run(judge=lambda row: True)
    reader.generation_config.block_length = 8
    with pytest.raises(
        ValueError, match=r"settings: `generate\.block_length` was 32, is 8\. Choose another `output_dir`"
    ):
        run()
    reader.generation_config.block_length = None
    for changes, name in (
        ({"threshold": 0.8}, r"settings: `generate\.threshold` was 0\.\d+, is 0\.8\. Choose"),
        ({"seed": 1}, "`seed` was 0, is 1"),
        ({"rows": prompts(6)}, "`prompts` was"),
        ({"rows": prompts().map(lambda row: {"n": row["n"] + 1})}, "`prompts` was"),
    ):
        with pytest.raises(ValueError, match=name):
            run(**changes)
    weight = reader.get_submodule(family.norm).weight.data
    before = weight.clone()
    weight[3] += 0.01
    with pytest.raises(ValueError, match="`model` was"):
        run()
    weight.copy_(before)
    again = run(judge=lambda row: False, batch_size=2)
    assert again["input_ids"][:] == first["input_ids"][:] and not any(again["correct"][:])


def test_the_digest_knows_weights_and_configuration(model):
    digest = model_digest(model)
    assert digest == model_digest(model)
    model.config.rms_norm_eps, eps = 0.5, model.config.rms_norm_eps
    assert model_digest(model) != digest
    model.config.rms_norm_eps = eps
    assert model_digest(model) == digest


def test_the_checksum_is_that_of_plain_integers():
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))

    def signed(value):
        return (value + 2**63) % 2**64 - 2**63

    data, total = tensor.numpy().tobytes(), 0
    data += bytes(-len(data) % 8)
    for number in range(len(data) // 8):
        place = number
        for factor, shift in ((0x1E3779B97F4A7C15, 31), (0x3F58476D1CE4E5B9, 27)):
            place = signed(place * factor)
            place ^= place >> shift
        total += int.from_bytes(data[8 * number : 8 * number + 8], "little", signed=True) * (place | 1)
    assert tensor_checksum(tensor) == tensor_checksum(tensor, chunk=3) == total % 2**64
    swapped = tensor.flatten()[[2, 3, 0, 1, *range(4, 35)]]
    assert tensor_checksum(swapped) != tensor_checksum(tensor) == tensor_checksum(tensor.T.contiguous().T)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "`prompts` must be a `datasets.Dataset` with a column `prompt`"),
        ([{"prompt": "a"}], {**SETTINGS, "judge": lambda row: row["label"]}, r"failed on example 0 with the columns"),
        ([{"prompt": "a"}], {**SETTINGS, "judge": lambda row: None}, "returned None for example 0"),
        ([{"question": "a"}], {}, r"a column `prompt`, but got \['question'\]"),
        ([{"prompt": "a", "correct": 1}], {}, r"has the columns \['correct'\]"),
        ([{"prompt": "a"}], {"generation_config": None}, "`generation_config` is not allowed: name its fields"),
        ([{"prompt": ""}], {}, "`prompt=''` is empty"),
        ([{"prompt": "a"}], {"num_return_sequences": 2, "do_sample": True}, "`num_return_sequences=2` must be 1"),
        ([{"prompt": "a"}], {"treshold": 2}, "`treshold` is not an argument"),
        (
            [{"prompt": "a"}, {"prompt": "Sam " * 2020}],
            {"max_new_tokens": 64},
            "Prompt 1 has 20[0-9]+ tokens: with `max_new_tokens=64`",
        ),
        ([{"prompt": "a"}], {**SETTINGS, "threshold": 2.0}, "`threshold=2.0` is not allowed"),
        ([{"prompt": "a"}], {"shard_size": 0}, "`shard_size=0` is not allowed"),
        ([{"prompt": "a"}], {"batch_size": 0}, "`batch_size=0` is not allowed"),
        ([{"prompt": "a"}], {"unmasking": "learned_filter"}, "`unmasking_filter=None` is not allowed"),
    ],
)
def test_bad_input(reader, word_tokenizer, tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        generate_trajectories(reader, word_tokenizer, Dataset.from_list(rows), tmp_path, **settings)


def test_layout_of_trajectories():
    """A response that ends is filled up with end-of-text, which the teacher never wrote; one that was cut is not."""
    row = {"input_ids": [5, 6, 7, 8, 0], "prompt_length": 2, "unmasking_step": [1, 0, 2]}
    assert lay_out_tokens(row, 0, response_length=5) == {
        "input_ids": [5, 6, 7, 8, 0, 0, 0], "prompt_length": 2, "unmasking_step": [-1, -1, 1, 0, 2, -1, -1],
    }  # fmt: skip
    assert lay_out_tokens(row, 0, max_length=6)["input_ids"] == [5, 6, 7, 8, 0, 0]
    assert lay_out_tokens(row, 0, max_length=4)["unmasking_step"] == [-1, -1, 1, 0]
    assert lay_out_tokens(row, 9, max_length=7)["input_ids"] == [5, 6, 7, 8, 0]
    with pytest.raises(ValueError, match="has 2 numbers for 3 response tokens"):
        lay_out_tokens({**row, "unmasking_step": [1, 0]}, 0)
