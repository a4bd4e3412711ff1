"""What an oracle accepts, and what a filter learns from it."""

import pytest
import torch
from datasets import Dataset
from torch import nn

from dparallel.modeling import UnmaskingFilter, UnmaskingFilterConfig
from dparallel.trainer import (
    FilterConfig,
    FilterTrainer,
    acceptance_rates,
    generate_trajectories,
    oracle_passes,
    record_oracle,
)
from dparallel.trainer.filter_trainer import split_by_prompt

K, G = 4, 10


class Teller(nn.Module):
    """Stands in for a model whose answers are known: it predicts a token at each position that depends on how many
    tokens of the answer are written."""

    def __init__(self, family, script):
        super().__init__()
        self.config, self.logits_shift, self.script = family.make().config, family.model.logits_shift, script
        self.weight = nn.Parameter(torch.zeros(1))

    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep):
        starts = (input_ids == 7).sum(dim=1, keepdim=True)  # prompts are of this token, answers are not
        places = starts + torch.arange(G)
        written = (input_ids.gather(1, places) != self.config.mask_token_id).sum(dim=1).tolist()
        said = torch.tensor([self.script(count) for count in written])
        said = said.gather(1, (logits_to_keep - starts + self.logits_shift).clamp(max=G - 1))
        logits = torch.nn.functional.one_hot(said, self.config.vocab_size) * 5.0
        return type("Output", (), {"logits": logits})()


def rows_of(answers):
    rows = [
        {"example_id": i, "input_ids": [7] * (i + 1) + ids, "prompt_length": i + 1} for i, ids in enumerate(answers)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_records_of_a_model_whose_answers_are_known(family, tmp_path, batch_size):
    """It says 1 1 1 1 | 2 2 2 2 | 3 3 at first, and 9 everywhere once six are written."""
    first = [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    teller = Teller(family, lambda written: first if written < 6 else [9] * G)
    eos = teller.config.eos_token_id
    answers = [first, [1, 5, 1, 1, 2, 9, 9, 2, 3, 9], [1, 1, eos]]
    found = record_oracle(
        teller, rows_of(answers), tmp_path, max_new_tokens=G, block_length=K, batch_size=batch_size, shard_size=2
    )
    seen = [(r["example_id"], r["block"], r["step"], r["masked"], r["labels"]) for r in found]
    assert seen == [
        (0, 0, 0, [1, 1, 1, 1], [1, 1, 1, 1]),
        (0, 1, 0, [1, 1, 1, 1], [1, 1, 1, 1]),
        (0, 2, 0, [1, 1, 0, 0], [0, 0, 1, 1]),  # 9 is wrong: filled from the answer
        (1, 0, 0, [1, 1, 1, 1], [1, 0, 1, 1]),
        (1, 0, 1, [0, 1, 0, 0], [1, 0, 1, 1]),  # the same once more: filled
        (1, 1, 0, [1, 1, 1, 1], [1, 0, 0, 1]),
        (1, 1, 1, [0, 1, 1, 0], [0, 1, 1, 0]),  # it says 9 by now
        (1, 2, 0, [1, 1, 0, 0], [0, 1, 1, 1]),
        (1, 2, 1, [1, 0, 0, 0], [0, 1, 1, 1]),
        (2, 0, 0, [1, 1, 1, 1], [1, 1, 0, 0]),  # behind its end stands end-of-text
        (2, 0, 1, [0, 0, 1, 1], [1, 1, 0, 0]),
    ]
    assert oracle_passes(found) == 11 / 3
    again = record_oracle(
        teller, rows_of(answers), tmp_path, max_new_tokens=G, block_length=K, batch_size=2, shard_size=2
    )
    assert again.to_list() == found.to_list()
    with pytest.raises(ValueError, match="`block_length` was 4, is 5"):
        record_oracle(teller, rows_of(answers), tmp_path, max_new_tokens=G, block_length=5, shard_size=2)
    with pytest.raises(ValueError, match="`max_new_tokens=9` is not allowed: an answer has 10"):
        record_oracle(teller, rows_of(answers), tmp_path, max_new_tokens=9)
    with pytest.raises(ValueError, match=r"lacks the columns \['prompt_length'\]"):
        record_oracle(teller, rows_of(answers).remove_columns("prompt_length"), tmp_path, max_new_tokens=9)


def synthetic(count=400, seed=0):
    """Predictions that are final where the confidence is above 0.7."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for example in range(count):
        for step in range(2):
            confidence = torch.rand(K, generator=generator)
            masked = torch.rand(K, generator=generator) < 0.8
            rows.append(
                {
                    "example_id": example, "block": 0, "step": step, "confidence": confidence.tolist(),
                    "entropy": [0.0] * K, "margin": [0.0] * K, "masked": masked.long().tolist(), "token": [0] * K,
                    "labels": (confidence > 0.7).long().tolist(),
                }
            )  # fmt: skip
    return Dataset.from_list(rows)


def train(tmp_path, **changes):
    settings = {"num_train_epochs": 25, "per_device_train_batch_size": 64, "report_to": "none"}
    torch.manual_seed(0)
    model = UnmaskingFilter(UnmaskingFilterConfig(block_length=K, hidden_size=16))
    config = FilterConfig(str(tmp_path), use_cpu=True, **(settings | changes))
    trainer = FilterTrainer(model, config, synthetic())
    trainer.train()
    return trainer


def test_it_learns_and_keeps_the_best(tmp_path, capsys):
    trainer = train(tmp_path, learning_rate=0.02)
    assert "eval_loss" not in "".join(capsys.readouterr())  # 25 lines of it
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6) and min(losses) < 0.5 * losses[0]
    held_out = synthetic(seed=1)
    rates = acceptance_rates(trainer.model, held_out, [0.1, 0.5, 0.9, 1.0])
    falls, rises = ([rate[name] for rate in rates] for name in ("false_accept", "false_reject"))
    assert falls == sorted(falls, reverse=True) and rises == sorted(rises)
    assert rates[1]["false_accept"] < 0.1 and rates[1]["false_reject"] < 0.1
    assert rates[-1] == {"threshold": 1.0, "false_accept": 0.0, "false_reject": 1.0}


def test_rates_by_hand():
    model = UnmaskingFilter(UnmaskingFilterConfig(block_length=K, num_layers=1))
    model.layers[0].weight.data = torch.eye(K)
    model.layers[0].bias.data.zero_()  # the probability is the sigmoid of the confidence
    rows = synthetic(1).select([0]).to_list()
    rows[0] |= {"confidence": [0.0, 1.0, 2.0, 3.0], "masked": [1, 1, 1, 0], "labels": [0, 1, 0, 1]}
    (rate,) = acceptance_rates(model, Dataset.from_list(rows), [0.6])
    assert rate == {"threshold": 0.6, "false_accept": 0.5, "false_reject": 0.0}
    rates = acceptance_rates("confidence", Dataset.from_list(rows), [0.6, 1.5])
    assert [list(rate.values()) for rate in rates] == [[0.6, 0.5, 0.0], [1.5, 0.5, 1.0]]


def test_an_answer_is_on_one_side():
    train_rows, eval_rows = split_by_prompt(synthetic(50), 0.2, seed=3)
    sides = set(train_rows["example_id"]), set(eval_rows["example_id"])
    assert not sides[0] & sides[1] and len(sides[1]) == 10 and len(sides[0]) == 40
    with pytest.raises(ValueError, match="leaves one side empty"):
        split_by_prompt(synthetic(3), 0.01)


def test_wrong_rows_and_settings(tmp_path):
    model = UnmaskingFilter(UnmaskingFilterConfig(block_length=8))
    with pytest.raises(ValueError, match="blocks of 4 tokens, but `block_length=8`"):
        FilterTrainer(model, FilterConfig(str(tmp_path), use_cpu=True), synthetic(4))
    with pytest.raises(ValueError, match=r"lacks the columns \['labels'\]"):
        FilterTrainer(model, FilterConfig(str(tmp_path), use_cpu=True), synthetic(4).remove_columns("labels"))
    with pytest.raises(ValueError, match=r"`eval_share=1\.5` is not allowed"):
        FilterConfig(str(tmp_path), eval_share=1.5)
    with pytest.raises(ValueError, match=r"`label_smoothing_factor=0\.1` is not allowed"):
        FilterConfig(str(tmp_path), label_smoothing_factor=0.1)


@pytest.mark.journey
def test_from_prompts_to_faster_decoding(word_model, word_tokenizer, tmp_path):
    """The whole way with the example model: its filter needs fewer passes, and keeps the answers."""
    questions = [
        f"Tom has {i} apples . He buys {i % 5 + 2} more . How many apples does he have ?" for i in range(3, 19)
    ]
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in questions])
    settings = {"max_new_tokens": 64, "batch_size": 16}
    slow = generate_trajectories(word_model, word_tokenizer, prompts, tmp_path / "slow", **settings)
    records = record_oracle(word_model, slow, tmp_path / "records", max_new_tokens=64)
    torch.manual_seed(0)
    model = UnmaskingFilter(UnmaskingFilterConfig())
    config = FilterConfig(
        str(tmp_path / "filter"), use_cpu=True, report_to="none", num_train_epochs=60, per_device_train_batch_size=32
    )
    FilterTrainer(model, config, records).train()
    word_model.set_unmasking_filter(model)
    try:
        fast = generate_trajectories(
            word_model, word_tokenizer, prompts, tmp_path / "fast", unmasking="learned_filter", threshold=0.7,
            **settings,
        )  # fmt: skip
        word_model.set_unmasking_filter(UnmaskingFilter(UnmaskingFilterConfig()))
        with pytest.raises(ValueError, match="`unmasking_filter` was"):
            generate_trajectories(
                word_model, word_tokenizer, prompts, tmp_path / "fast", unmasking="learned_filter", threshold=0.7,
                **settings,
            )  # fmt: skip
    finally:
        word_model.set_unmasking_filter(None)
    fast_passes, slow_passes = sum(fast["num_forward_passes"]), sum(slow["num_forward_passes"])
    assert oracle_passes(records) * len(questions) <= fast_passes < 0.6 * slow_passes
