"""The trainer: its data, its loss against a plain one, and that it learns, resumes and takes adapters."""

import copy
import itertools
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch.nn import functional as F
from transformers import TrainingArguments
from trl import apply_chat_template

from dparallel.trainer import (
    DataCollatorForMaskedDiffusion,
    MaskedDiffusionConfig,
    MaskedDiffusionTrainer,
    last_complete_checkpoint,
)
from dparallel.trainer.checkpoints import load_optimizer, load_weights
from dparallel.trainer.losses import masked_diffusion_losses
from dparallel.trainer.masking import random_masks, response_mask
from dparallel.trainer.tokenization import tokenize_example, tokenize_prompt
from tests.families import FAMILIES
from tests.golden import CHECKPOINT
from tests.modeling.test_generation import ShiftedConfig, ShiftedModel

EOS, MASK = 0, 1


def rows(count=40):
    return [
        {"prompt": f"Sam has {i} books. " * (1 + i % 3), "completion": "So " * (1 + i % 5) + f"it is {i}."}
        for i in range(count)
    ]


def settings(tmp_path, **changes):
    defaults = {"output_dir": str(tmp_path), "report_to": "none", "save_strategy": "no", "use_cpu": True}
    defaults |= {"max_length": 64, "per_device_train_batch_size": 8, "logging_steps": 1, "disable_tqdm": True}
    return MaskedDiffusionConfig(**(defaults | changes))


def build_trainer(tmp_path, tokenizer, model, dataset=None, **changes):
    dataset = Dataset.from_list(rows()) if dataset is None else dataset
    kinds = {key: changes.pop(key) for key in ("peft_config", "eval_dataset") if key in changes}
    return MaskedDiffusionTrainer(
        model=model, args=settings(tmp_path, **changes), train_dataset=dataset, processing_class=tokenizer, **kinds
    )


@pytest.fixture
def make_trainer(small_model):
    def make(tmp_path, tokenizer, model=None, dataset=None, **changes):
        return build_trainer(tmp_path, tokenizer, small_model() if model is None else model, dataset, **changes)

    return make


def any_model(name):
    """Of a family, or of one that is made up."""
    if name in FAMILIES:
        return FAMILIES[name].small()
    torch.manual_seed(0)
    return ShiftedModel(ShiftedConfig(vocab_size=592, mask_token_id=MASK))


# --- data ------------------------------------------------------------------------------------------------------------


def test_prompt_and_completion(word_tokenizer):
    example = {"prompt": "Sam has 3", "completion": " books."}
    prompt, answer = (word_tokenizer(example[key])["input_ids"] for key in ("prompt", "completion"))
    row = tokenize_example(example, word_tokenizer, max_length=12)
    padding = [EOS] * (12 - len(prompt) - len(answer))
    assert row == {"input_ids": prompt + answer + padding, "prompt_length": len(prompt)}
    assert len(padding) > 1  # end-of-text behind the answer is learned
    assert tokenize_example(example, word_tokenizer)["input_ids"] == prompt + answer + [EOS]
    row = tokenize_example(example, word_tokenizer, max_length=100, response_length=9)
    assert row["input_ids"] == prompt + answer + [EOS] * (9 - len(answer))
    cut = tokenize_example(example, word_tokenizer, response_length=2)
    assert cut["input_ids"] == prompt + answer[:2]
    assert tokenize_example(example, word_tokenizer, max_length=len(prompt) + 1)["input_ids"] == prompt + answer[:1]


def test_conversations(word_tokenizer):
    question, answer = {"role": "user", "content": "Sam has 3."}, {"role": "assistant", "content": "So 3."}
    as_messages = tokenize_example({"messages": [question, answer]}, word_tokenizer)
    as_pair = tokenize_example({"prompt": [question], "completion": [answer]}, word_tokenizer)
    assert as_messages == as_pair
    prompt = word_tokenizer.apply_chat_template([question], add_generation_prompt=True)["input_ids"]
    assert as_pair["input_ids"] == prompt + word_tokenizer("So 3.")["input_ids"] + [EOS]
    assert as_pair["prompt_length"] == len(prompt)
    with pytest.raises(ValueError, match="last role is 'user'"):
        tokenize_example({"messages": [answer, question]}, word_tokenizer)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
SYSTEM, USER = {"role": "system", "content": "Sam is kind."}, {"role": "user", "content": "Sam has 3."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
RESULT, ANSWER = {"role": "tool", "content": "4"}, {"role": "assistant", "content": "So 4."}
TEMPLATE = (
    "{% for t in tools or [] %}tool {{ t['function']['name'] }} {% endfor %}{% if loud %}! {% endif %}"
    "{% for d in documents or [] %}book {{ d['text'] }} {% endfor %}"
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} "
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def tool_tokenizer(word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("as_pair", [True, False])
@pytest.mark.parametrize(
    ("prompt", "extra"),
    [
        ([USER], {"tools": TOOLS}),
        ([USER], {"tools": json.dumps(TOOLS)}),
        ([USER], {"tools": []}),
        ([USER], {"tools": None, "chat_template_kwargs": None}),
        ([USER], {"chat_template_kwargs": {"loud": True}}),
        ([USER], {"chat_template_kwargs": {"documents": [{"title": "a", "text": "books"}]}, "tools": TOOLS}),
        ([SYSTEM, USER], {"tools": TOOLS}),
        ([USER, CALL, RESULT], {"tools": TOOLS}),
    ],
)
def test_conversations_are_rendered_as_by_trl(tool_tokenizer, prompt, extra, as_pair):
    row = {"prompt": prompt, "completion": [ANSWER]} if as_pair else {"messages": [*prompt, ANSWER]}
    found = tokenize_example({**row, **extra}, tool_tokenizer)
    kwargs = extra.get("chat_template_kwargs") or {}
    tools = TOOLS if extra.get("tools") else None
    example = {"prompt": prompt, "completion": [ANSWER], "chat_template_kwargs": kwargs}
    expected = apply_chat_template(example, tool_tokenizer, tools)
    ids = [tool_tokenizer(expected[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "completion")]
    assert found == {"input_ids": [*ids[0], *ids[1], EOS], "prompt_length": len(ids[0])}
    assert tokenize_prompt({**row, **extra}, tool_tokenizer) == ids[0]
    plain = tokenize_prompt({"prompt": prompt}, tool_tokenizer)
    assert (plain != ids[0]) == bool(tools or kwargs)  # it is shown


def test_tools_reach_the_trainer(tmp_path, tool_tokenizer, make_trainer):
    row = {"messages": [USER, ANSWER], "tools": TOOLS}
    found = make_trainer(tmp_path, tool_tokenizer, dataset=Dataset.from_list([row, row])).train_dataset[0]
    assert found["input_ids"][: found["prompt_length"]] == tokenize_prompt(row, tool_tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "`tools` is not allowed beside text"),
        ({"text": "a", "tools": TOOLS}, "`tools` is not allowed beside text"),
        (
            {"prompt": "a", "completion": "b", "chat_template_kwargs": {"x": 1}},
            "`chat_template_kwargs` is not allowed",
        ),
        ({"messages": [USER, ANSWER], "documents": [{"text": "a"}]}, "`documents` is not allowed beside messages"),
        ({"prompt": [USER], "completion": [ANSWER], "images": ["a"]}, "`images` is not allowed beside messages"),
    ],
)
def test_columns_that_would_not_be_shown(tool_tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        tokenize_example(row, tool_tokenizer)


def test_text_is_learned_from_its_first_token(word_tokenizer):
    row = tokenize_example({"text": "Sam has 3 books."}, word_tokenizer, max_length=50)
    assert row == {"input_ids": word_tokenizer("Sam has 3 books.")["input_ids"] + [EOS], "prompt_length": 0}


def test_collator_masks_only_what_it_adds():
    """End-of-text is the padding token too, and is learned where it belongs to the response."""
    features = [
        {"input_ids": [5, 6, EOS, EOS], "prompt_length": 1, "example_id": 7},
        {"input_ids": [5, EOS], "prompt_length": 1, "example_id": 8},
    ]
    batch = DataCollatorForMaskedDiffusion(EOS, pad_to_multiple_of=3)(features)
    assert batch["input_ids"].tolist() == [[5, 6, EOS, EOS, EOS, EOS], [5, EOS, EOS, EOS, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["prompt_length"].tolist() == [1, 1] and batch["example_id"].tolist() == [7, 8]


def test_rows_without_a_response_are_counted(tmp_path, word_tokenizer, caplog, make_trainer):
    long = {"prompt": "Sam has 3 books. " * 20, "completion": "3."}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, word_tokenizer, dataset=Dataset.from_list([*rows(3), long, long]))
    assert "2 of 5 examples dropped" in caplog.text and "max_length=64" in caplog.text
    assert trainer.train_dataset["example_id"][:] == [0, 1, 2]
    named = Dataset.from_list([{**row, "example_id": f"question {i}"} for i, row in enumerate(rows(3))])
    assert make_trainer(tmp_path, word_tokenizer, dataset=named).train_dataset["example_id"][:] == [0, 1, 2]
    with pytest.raises(ValueError, match="`train_dataset` has no example with a response"):
        make_trainer(tmp_path, word_tokenizer, dataset=Dataset.from_list([long]))


def test_much_padding_is_mentioned(tmp_path, word_tokenizer, caplog, make_trainer):
    short = Dataset.from_list([{"prompt": "Sam has 3 books.", "completion": "So 3."}])
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, word_tokenizer, dataset=short, response_length=8)
        assert "end-of-text behind" not in caplog.text
        make_trainer(tmp_path, word_tokenizer, dataset=short, response_length=40)
    assert "88% of what is learned is end-of-text behind the answers" in caplog.text  # 35 of 40
    assert "Lower `response_length=40`" in caplog.text


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_list([{"question": "a", "answer": "b"}]), r"has the columns \['answer', 'question'\]"),
        (Dataset.from_dict({"prompt": [], "completion": []}), "`train_dataset` is empty"),
        (Dataset.from_list([{"messages": "Hi"}]), "`messages='Hi'` is not allowed: it must be a list of messages"),
        (Dataset.from_list([{"messages": []}]), r"`messages=\[\]` is not allowed: it must be a list of messages"),
    ],
)
def test_wrong_datasets(tmp_path, word_tokenizer, dataset, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, word_tokenizer, dataset=dataset)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": "64"}, "max_length='64'"),
        ({"dataset_num_proc": "2"}, "dataset_num_proc='2'"),
        ({"loss_weighting": "t"}, "loss_weighting='t'"),
        ({"block_length": -1}, "block_length=-1"),
        ({"response_length": 0}, "response_length=0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False"),
        ({"include_for_metrics": ["loss"]}, "include_for_metrics=['loss']"),
        ({"length_column_name": "n"}, "length_column_name='n'"),
        ({"use_cache": True}, "use_cache=True"),
    ],
)
def test_wrong_arguments(tmp_path, changes, name):
    with pytest.raises(ValueError, match=re.escape(f"`{name}` is not allowed")):
        settings(tmp_path, **changes)


def test_models_that_cannot_be_trained(tmp_path, word_tokenizer, make_trainer, small_model):
    model = small_model()
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="mask_token_id"):
        make_trainer(tmp_path, word_tokenizer, model=model)
    with pytest.raises(ValueError, match="compute_metrics"):
        MaskedDiffusionTrainer(small_model(), settings(tmp_path), compute_metrics=print)
    with pytest.raises(ValueError, match="model_init_kwargs"):
        make_trainer(tmp_path, word_tokenizer, model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match=r"`peft_config=\{'r': 8\}` is not allowed: it must be a PeftConfig"):
        MaskedDiffusionTrainer(small_model(), settings(tmp_path), peft_config={"r": 8})
    with pytest.raises(ValueError, match="`model='/no/where/else'` is not allowed: there is no such folder"):
        MaskedDiffusionTrainer("/no/where/else", settings(tmp_path))
    with pytest.raises(ValueError, match="`model='/no/where/else'` is not allowed: there is no such folder"):
        MaskedDiffusionTrainer(Path("/no/where/else"), settings(tmp_path))


def test_a_model_without_a_tokenizer(tmp_path, small_model):
    nameless, named = small_model(), small_model()
    named.config._name_or_path = str(tmp_path)  # where there is none
    for model, message in ((nameless, "was not loaded from anywhere: pass"), (named, "no tokenizer could be loaded")):
        with pytest.raises(ValueError, match=f"`processing_class` is not given, and .*{message}"):
            MaskedDiffusionTrainer(model, settings(tmp_path), train_dataset=Dataset.from_list(rows(3)))


def test_batches_that_are_not_filled(tmp_path, word_tokenizer, make_trainer):
    trainer = make_trainer(
        tmp_path, word_tokenizer, dataset=Dataset.from_list(rows(5)), dataloader_drop_last=True,
        eval_dataset=Dataset.from_list(rows(3)),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"`dataloader_drop_last=True` is not allowed with 5 examples .* of 8 over"):
        trainer.train()
    with pytest.raises(ValueError, match="no batch to evaluate: with `dataloader_drop_last=True` and `per_device_"):
        trainer.evaluate()
    stream = Dataset.from_list(rows(5)).to_iterable_dataset()
    with pytest.raises(ValueError, match="`dataloader_drop_last=True` is not allowed with a stream"):
        make_trainer(tmp_path, word_tokenizer, dataset=stream, dataloader_drop_last=True, max_steps=1)


def test_rows_cannot_be_cut_between_devices(tmp_path, word_tokenizer, make_trainer, monkeypatch):
    monkeypatch.setattr(MaskedDiffusionTrainer, "get_cp_size", lambda self: 2)
    with pytest.raises(ValueError, match="`parallelism_config` with context or sequence parallelism is not allowed"):
        make_trainer(tmp_path, word_tokenizer)


def test_columns_are_kept_for_a_collator_that_wants_them(tmp_path, word_tokenizer, make_trainer):
    dataset = Dataset.from_list([{**row, "n": i} for i, row in enumerate(rows(3))])
    assert "n" not in make_trainer(tmp_path, word_tokenizer, dataset=dataset).train_dataset.column_names
    trainer = make_trainer(tmp_path, word_tokenizer, dataset=dataset, remove_unused_columns=False, max_steps=1)
    assert trainer.train_dataset["n"][:] == [0, 1, 2]
    trainer.train()


# --- loss ------------------------------------------------------------------------------------------------------------


def plain_loss(model, batch, args, epoch, shift):
    """The loss of a batch row by row from logits of whole sequences."""
    losses = []
    for i in range(len(batch["input_ids"])):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        masks = random_masks(
            response_mask(row["prompt_length"], row["attention_mask"], shift),
            seed=args.seed, epoch=epoch, example_id=row["example_id"],
        )  # fmt: skip
        noisy = torch.where(masks.hidden, model.config.mask_token_id, row["input_ids"])
        logits = model(input_ids=noisy, attention_mask=row["attention_mask"]).logits[0]
        terms = [
            F.cross_entropy(logits[p - shift], row["input_ids"][0, p])
            for p in masks.scored[0].nonzero().flatten().tolist()
        ]
        total = torch.stack(terms).sum() if terms else torch.zeros(())
        length = masks.span_length[0]
        scale = {"inverse_t": masks.ratio[0] * length, "uniform": max(len(terms), 1), "token": length}
        losses.append(total / scale[args.loss_weighting])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", [*FAMILIES, "shifted"])
@pytest.mark.parametrize("loss_weighting", ["inverse_t", "uniform", "token"])
def test_loss_equals_the_plain_one(tmp_path, word_tokenizer, loss_weighting, name):
    model = any_model(name)
    trainer = build_trainer(tmp_path, word_tokenizer, model, loss_weighting=loss_weighting)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    loss = trainer.compute_loss(model.train(), batch)
    expected = plain_loss(model, batch, trainer.args, 0, model.logits_shift)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(loss, model.parameters()), torch.autograd.grad(expected, model.parameters()), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_row_without_masks_costs_nothing():
    logits = torch.randn(2, 4, 9, requires_grad=True)
    labels, masked = torch.zeros(2, 4, dtype=torch.long), torch.tensor([[True] * 4, [False] * 4])
    for weighting in ("inverse_t", "uniform", "token"):
        ratio, length = torch.tensor([0.5, 0.5]), torch.tensor([4, 4])
        first, second = masked_diffusion_losses(logits, labels, masked, ratio, length, weighting)
        assert second == 0 and first > 0


def weights_after(trainer):
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("count", [8, 10, 13])
def test_micro_batches_make_the_same_step(tmp_path, word_tokenizer, make_trainer, count):
    """10 rows as 1 x 10, 8 + 2, 3 x 3 + 1 and 10 x 1: gradients are means over all rows of a step, also where the last
    micro-batch is smaller, and masks do not know of batches. So are the logged values."""
    results = []
    for size in (count, 8, 3, 1):
        trainer = make_trainer(
            tmp_path, word_tokenizer, dataset=Dataset.from_list(rows(count)), per_device_train_batch_size=size,
            gradient_accumulation_steps=-(-count // size), max_steps=4, learning_rate=0.1, block_length=16,
            optim="sgd", lr_scheduler_type="constant",
        )  # fmt: skip
        weights = weights_after(trainer)
        names = ("loss", "grad_norm", "masked_accuracy", "mean_entropy")
        logged = [[entry[name] for name in names] for entry in trainer.state.log_history if "grad_norm" in entry]
        results.append((weights, torch.tensor(logged)))
    for weights, logged in results[1:]:
        torch.testing.assert_close(results[0][0], weights, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(results[0][1], logged, atol=1e-4, rtol=1e-4)


def test_what_a_stream_has_left_goes_into_the_next_epoch(tmp_path, word_tokenizer, make_trainer):
    """And is not added to a step that is already whole."""
    seen = []
    trainer = make_trainer(
        tmp_path, word_tokenizer, dataset=Dataset.from_list(rows(10)).to_iterable_dataset(), max_steps=3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    compute_loss = trainer.compute_loss

    def spy(model, inputs, **kwargs):
        seen.append((len(inputs["input_ids"]), inputs["row_weight"].sum().item()))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    sizes, shares = zip(*seen, strict=True)
    assert sizes == (4, 4, 2, 4, 4, 2) and shares == pytest.approx((1 / 2, 1 / 2, 1 / 3, 2 / 3, 2 / 3, 1 / 3))


def test_after_running_out_of_memory_only_the_smaller_batches_are_logged(tmp_path, word_tokenizer, small_model):
    class Forgetful(MaskedDiffusionTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if len(inputs["input_ids"]) > 4:
                self._train_metrics += 1000
                raise RuntimeError("CUDA out of memory.")
            return loss

    args = settings(tmp_path, auto_find_batch_size=True, max_steps=1)
    trainer = Forgetful(small_model(), args, train_dataset=Dataset.from_list(rows()), processing_class=word_tokenizer)
    trainer.train()
    logged = trainer.state.log_history[0]["mean_entropy"]
    assert logged == pytest.approx(6.38, abs=0.1)  # about log(592) nats


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_length", [None, 16])
def test_training_learns_and_logs(tmp_path, word_tokenizer, block_length, make_trainer):
    trainer = make_trainer(
        tmp_path, word_tokenizer, max_steps=60, learning_rate=1e-2, block_length=block_length,
        eval_dataset=Dataset.from_list(rows(16)), eval_strategy="steps", eval_steps=10,
    )  # fmt: skip
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "masked_accuracy" in entry]
    assert history[0]["masked_accuracy"] < 0.1 < 0.6 < history[-1]["masked_accuracy"]
    assert 0 < history[-1]["mean_confidence"] <= 1 and history[-1]["loss"] < history[0]["loss"] / 2
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"]  # the masks of an evaluation are fixed
    assert first["eval_masked_accuracy"] == second["eval_masked_accuracy"]


def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path, word_tokenizer, make_trainer, small_model):
    options = {"max_steps": 12, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 7}
    unbroken = weights_after(make_trainer(tmp_path / "a", word_tokenizer, **options))
    make_trainer(tmp_path / "b", word_tokenizer, **options)
    trainer = make_trainer(tmp_path / "b", word_tokenizer, model=small_model(seed=5), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-7"))
    resumed = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    assert torch.equal(unbroken, resumed)


def test_a_run_that_has_ended_makes_no_step_more(tmp_path, word_tokenizer, make_trainer):
    """Also where its last step lies inside an epoch; nor is anything saved again."""
    options = {"max_steps": 7, "learning_rate": 1e-3, "save_strategy": "epoch", "lr_scheduler_type": "constant"}
    expected = weights_after(make_trainer(tmp_path, word_tokenizer, **options))
    saved = tmp_path / "checkpoint-7" / "optimizer.pt"
    before = saved.stat().st_mtime_ns
    trainer = make_trainer(tmp_path, word_tokenizer, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7 and saved.stat().st_mtime_ns == before
    assert torch.equal(expected, torch.cat([each.detach().flatten() for each in trainer.model.parameters()]))


OTHER_SETTINGS = [
    ({"learning_rate": 1e-4}, "`learning_rate` was 0.001, is 0.0001"),
    ({"lr_scheduler_type": "cosine"}, "`lr_scheduler_type` was 'linear', is 'cosine'"),
    ({"warmup_steps": 1}, "`warmup_steps` was 0, is 1"),
    ({"weight_decay": 0.1}, "`weight_decay` was 0.0, is 0.1"),
    ({"max_grad_norm": 0.5}, "`max_grad_norm` was 1.0, is 0.5"),
    ({"optim": "sgd"}, "`optim` was 'adamw_torch_fused', is 'sgd'"),
    ({"bf16": True}, "`bf16` was False, is True"),
    ({"seed": 7}, "`seed` was 42, is 7"),
    ({"max_steps": 8}, "`max_steps` was 4, is 8"),  # the learning rate falls to 0 at the last step
    ({"max_length": 32}, "`max_length` was 64, is 32"),
    ({"response_length": 8}, "`response_length` was None, is 8"),
    ({"block_length": 16}, "`block_length` was None, is 16"),
    ({"loss_weighting": "token"}, "`loss_weighting` was 'inverse_t', is 'token'"),
    ({"per_device_train_batch_size": 4}, "`global batch size` was 8, is 4"),
    ({"gradient_accumulation_steps": 2}, "`global batch size` was 8, is 16"),
    ({"dataset": Dataset.from_list(rows(30))}, "`train_dataset.rows` was 40, is 30"),
    ({"dataset": Dataset.from_list(rows(40)[::-1])}, "`train_dataset.digest` was '"),
    ({"peft_config": None}, "`adapter.peft_type` was 'LORA', is None"),
    ({"peft_config": LoraConfig(r=4)}, "`adapter.r` was 2, is 4"),
    ({"peft_config": LoraConfig(r=2, lora_alpha=1)}, "`adapter.lora_alpha` was 8, is 1"),
    ({"peft_config": LoraConfig(r=2, target_modules=["k_proj"])}, "`adapter.target_modules` was "),
    ({"peft_config": IA3Config(target_modules=["k_proj"], feedforward_modules=[])}, "`adapter.peft_type` was 'LORA'"),
    ({"model": FAMILIES["llada"].small(seed=3)}, "`weights under the adapter` was '"),
    ({"model": FAMILIES["llada"].small().bfloat16()}, "`dtype` was 'torch.float32', is 'torch.bfloat16'"),
]
FREE_SETTINGS = [
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    {"logging_steps": 2, "save_steps": 3, "save_total_limit": 1},
    {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Dataset.from_list(rows(3)), "eval_on_start": True},
    {"gradient_checkpointing": True, "pad_to_multiple_of": 8, "dataset_num_proc": 1},
]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory, word_tokenizer):
    """A folder with checkpoints of an adapter after two and four steps, and the weights at the end."""
    folder = tmp_path_factory.mktemp("run")
    return folder, weights_after(adapter_trainer(folder, word_tokenizer))


def adapter_trainer(folder, tokenizer, model=None, **changes):
    options = {"max_steps": 4, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    options |= {"peft_config": LoraConfig(r=2), "lr_scheduler_type": "linear"}
    model = FAMILIES["llada"].small() if model is None else copy.deepcopy(model)
    return build_trainer(folder, tokenizer, model, **(options | changes))


@pytest.mark.parametrize(("changes", "message"), OTHER_SETTINGS)
def test_a_run_does_not_go_on_with_other_settings(tmp_path, word_tokenizer, a_run, changes, message):
    trainer = adapter_trainer(tmp_path, word_tokenizer, **changes)
    with pytest.raises(ValueError, match=f"is of a run with other settings: .*{re.escape(message)}"):
        trainer.train(resume_from_checkpoint=str(a_run[0] / "checkpoint-2"))


@pytest.mark.parametrize("changes", FREE_SETTINGS)
def test_a_run_goes_on_where_the_same_steps_are_made(tmp_path, word_tokenizer, a_run, changes):
    folder, expected = a_run
    trainer = adapter_trainer(tmp_path, word_tokenizer, **changes)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    found = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_how_long_a_run_is_may_change_where_nothing_depends_on_it(tmp_path, word_tokenizer, make_trainer):
    options = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    make_trainer(tmp_path, word_tokenizer, max_steps=2, **options).train()
    longer = weights_after(make_trainer(tmp_path / "longer", word_tokenizer, max_steps=4, **options))
    trainer = make_trainer(tmp_path, word_tokenizer, max_steps=4, **options)
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(longer, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    with pytest.raises(ValueError, match=r"`warmup_steps` was 0, is 0\.5"):
        make_trainer(tmp_path, word_tokenizer, max_steps=6, **options, warmup_steps=0.5).train(True)


def test_checkpoints_without_settings_go_on_with_a_warning(tmp_path, word_tokenizer, make_trainer, caplog):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, word_tokenizer, max_steps=1, **options).train()
    (tmp_path / "checkpoint-1" / "settings.json").unlink()
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, word_tokenizer, max_steps=2, seed=3, **options).train(resume_from_checkpoint=True)
    assert "checkpoint-1 has no settings.json: whether it was trained with other settings is unknown" in caplog.text


def test_the_record_of_a_training(tmp_path, word_tokenizer, make_trainer):
    """Says 0 where something is 0, and one length of the training."""
    trainer = make_trainer(tmp_path, word_tokenizer, max_steps=1, weight_decay=0.0, optim="sgd", warmup_steps=3)
    trainer.train()
    trainer.save_model()
    arguments = json.loads((tmp_path / "training.json").read_text())["arguments"]
    expected = {"max_steps": "1", "weight_decay": "0.0", "optim": "sgd", "warmup_steps": "3", "global batch": 8}
    assert arguments.items() >= expected.items()
    assert not {"num_train_epochs", "bf16", "fp16", "block_length", "pad_to_multiple_of"} & arguments.keys()


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path, word_tokenizer, make_trainer, small_model):
    options = {"max_steps": 6, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    unbroken = weights_after(make_trainer(tmp_path, word_tokenizer, **options))
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_')
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    trainer = make_trainer(tmp_path, word_tokenizer, model=small_model(seed=5), **options)
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(unbroken, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make_trainer(tmp_path / "new", word_tokenizer).train(resume_from_checkpoint=True)


def test_checkpoints_that_cannot_go_on_here(tmp_path, word_tokenizer, make_trainer):
    trainer = make_trainer(tmp_path, word_tokenizer, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    foreign = tmp_path / "foreign"
    shutil.copytree(tmp_path / "checkpoint-1", foreign)
    (foreign / "optimizer.pt").rename(foreign / "optimizer_0")  # as FSDP calls its shards
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint=.*foreign'` is not allowed .* no optimizer.pt"):
        trainer.train(resume_from_checkpoint=str(foreign))
    (foreign / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors, as FSDP writes them with"):
        trainer.train(resume_from_checkpoint=str(foreign))
    (foreign / "global_step1").mkdir()
    with pytest.raises(ValueError, match="was saved under DeepSpeed, and this is one device or DDP"):
        trainer.train(resume_from_checkpoint=str(foreign))


def test_optimizers_without_moments_and_checkpoints_without_a_schedule(
    tmp_path, word_tokenizer, make_trainer, small_model
):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    options |= {"lr_scheduler_type": "linear"}
    unbroken = weights_after(make_trainer(tmp_path, word_tokenizer, **options))
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "pytorch_model_fsdp.bin").touch()  # as under another layout
    trainer = make_trainer(tmp_path / "resumed", word_tokenizer, model=small_model(seed=5), **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(unbroken, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    with pytest.raises(ValueError, match=r"has an optimizer of \d+ parameters: the model trains 1"):
        load_optimizer(trainer.model, torch.optim.SGD([next(trainer.model.parameters())]), checkpoint)
    other = torch.optim.Adadelta([{"params": group["params"]} for group in trainer.optimizer.param_groups])
    with pytest.raises(ValueError, match=r"has another kind of optimizer, with \['dampening', "):
        load_optimizer(trainer.model, other, checkpoint)
    (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint=.*` is not allowed: it has no scheduler.pt"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoRA of the embedding", "LoRA and the head", "another name"])
def test_weights_of_adapters_are_found(family, tmp_path, kind):
    """By the names that peft saves them under, which are not plain for every kind."""
    embedding, head = (name.rsplit(".", 1)[-1] for name in (family.embedding, family.head))
    targets = ["q_proj", embedding] if kind == "LoRA of the embedding" else ["q_proj"]
    config = LoraConfig(
        r=2, target_modules=targets, use_dora=kind == "DoRA", modules_to_save=[head] if "head" in kind else None
    )
    name = "mine" if kind == "another name" else "default"
    saved, other = (get_peft_model(family.small(), config, name) for _ in range(2))
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(parameter.requires_grad * torch.rand_like(parameter))
    saved.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    for one, two in zip(saved.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_with_a_missing_file_is_refused(small_model, tmp_path):
    small_model().save_pretrained(tmp_path, max_shard_size="50KB")
    load_weights(small_model(seed=5), tmp_path)
    sorted(tmp_path.glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint=.*` lacks weights that the model trains: \["):
        load_weights(small_model(seed=5), tmp_path)


def test_best_checkpoint_by_masked_accuracy(tmp_path, word_tokenizer, make_trainer):
    trainer = make_trainer(
        tmp_path, word_tokenizer, max_steps=6, eval_dataset=Dataset.from_list(rows(8)), eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_masked_accuracy",
    )  # fmt: skip
    trainer.train()
    best = max(entry["eval_masked_accuracy"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.state.best_metric == best


@pytest.mark.parametrize(
    ("name", "kind"),
    [*itertools.product(FAMILIES, [None, "LoRA", "DoRA", "norms"]), ("shifted", None), ("shifted", "LoRA")],
)
def test_vectors_do_not_decay(tmp_path, word_tokenizer, name, kind):
    """Norms and biases, whatever they are called, and matrices alone."""
    adapters = {
        "LoRA": LoraConfig(target_modules="all-linear", bias="all"),
        "DoRA": LoraConfig(target_modules="all-linear", use_dora=True),
        "norms": LNTuningConfig(target_modules=[getattr(FAMILIES.get(name), "norm", "none").rpartition(".")[2]]),
    }
    options = {"weight_decay": 0.1, "peft_config": adapters.get(kind)}
    trainer = build_trainer(tmp_path, word_tokenizer, any_model(name), **options)
    decayed, others = (group["params"] for group in trainer.create_optimizer().param_groups)
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert {id(weight) for weight in decayed} == {id(weight) for weight in trained if weight.ndim > 1}
    assert len(decayed) + len(others) == len(trained) and (others or kind == "LoRA" or name == "shifted")


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(tmp_path, word_tokenizer, config, make_trainer, small_model):
    config = config(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=32, num_attention_heads=4,
        num_transformer_submodules=1,
    )  # fmt: skip
    message = f"of type {config.peft_type.value} are not supported: their virtual tokens stand before the text"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, word_tokenizer, peft_config=config)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, word_tokenizer, model=get_peft_model(small_model(), config))


def test_adapter(tmp_path, word_tokenizer, family, make_trainer, small_model):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(target_modules=["q_proj", family.projections[3]], r=4)
    trainer = make_trainer(
        tmp_path, word_tokenizer, peft_config=config, max_steps=3, learning_rate=1e-2, gradient_checkpointing=True
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    trainer.save_model()
    loaded = PeftModel.from_pretrained(small_model(), tmp_path)
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    # An adapter decodes: generate() of the wrapped model is ours.
    assert torch.equal(loaded.generate(ids, max_new_tokens=8), trainer.model.generate(ids, max_new_tokens=8))
    with pytest.raises(ValueError, match="already is a PeftModel"):
        make_trainer(tmp_path, word_tokenizer, model=get_peft_model(small_model(), config), peft_config=config)


def test_model_by_path_and_streamed_data(tmp_path):
    dataset = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "Sam has 3."}, {"role": "assistant", "content": "So 3."}]}] * 8
    )
    trainer = MaskedDiffusionTrainer(
        str(CHECKPOINT),
        settings(tmp_path, max_steps=2, model_init_kwargs={"dtype": "float32"}, per_device_train_batch_size=2),
        train_dataset=dataset.to_iterable_dataset(),
    )
    assert trainer.processing_class.mask_token == "<|mask|>"
    trainer.train()
    assert trainer._epoch == 0
    trainer.save_model()
    assert "diffusion" in trainer.model.model_tags
    assert (tmp_path / "modeling_llada.py").exists() and (tmp_path / "tokenizer.json").exists()


def test_streams_keep_the_rule_of_the_masks(tmp_path, word_tokenizer, caplog, small_model):
    """Ids come from the example and not from its place, and each pass over a stream is a new epoch."""
    long = {"prompt": "Sam has 3 books. " * 20, "completion": "3."}
    stream = Dataset.from_list([*rows(8), long]).to_iterable_dataset()
    seen = []

    class Spy(MaskedDiffusionTrainer):
        def draw_masks(self, inputs, response, **randomness):
            seen.append((randomness["epoch"], tuple(randomness["example_id"].tolist())))
            return super().draw_masks(inputs, response, **randomness)

    args = settings(tmp_path, max_steps=6, per_device_train_batch_size=4)
    with caplog.at_level(logging.WARNING):
        Spy(small_model(), args, train_dataset=stream, processing_class=word_tokenizer).train()
    assert [epoch for epoch, _ in seen] == [0, 0, 1, 1, 2, 2]
    assert seen[0][1] == seen[2][1] != seen[1][1] and len(set(seen[0][1] + seen[1][1])) == 8
    assert "1 of 9 examples dropped" in caplog.text
    shuffled = MaskedDiffusionTrainer(
        small_model(), args, train_dataset=stream.shuffle(seed=3), processing_class=word_tokenizer
    )
    ids = {row["example_id"] for row in shuffled.train_dataset}
    assert ids == set(seen[0][1] + seen[1][1])


def test_evaluation_of_another_dataset(tmp_path, word_tokenizer, make_trainer):
    trainer = make_trainer(tmp_path, word_tokenizer, eval_dataset=Dataset.from_list(rows(8)))
    again = trainer.evaluate(Dataset.from_list(rows(8)))
    assert again["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    for dataset in (Dataset.from_list(rows(8)), trainer.eval_dataset):
        metrics = trainer.predict(dataset).metrics
        assert metrics["test_loss"] == pytest.approx(again["eval_loss"])
        assert metrics["test_masked_accuracy"] == pytest.approx(again["eval_masked_accuracy"])
    with pytest.raises(ValueError, match="`test_dataset` has the columns"):
        trainer.predict(Dataset.from_list([{"a": 1}]))
    trainer.create_model_card()
    with pytest.raises(TypeError, match="licence"):
        trainer.create_model_card(licence="mit")
    assert "- dparallel" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "must both be text, or both messages"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "must both be text, or both messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "something must be asked"),
        ({"prompt": "a<|mask|>", "completion": "b"}, "an example with the mask token, id 1"),
        ({"input_ids": [5, 1, 7], "prompt_length": 1}, "an example with the mask token, id 1"),
        ({"prompt": "a"}, r"has the columns \['prompt'\]"),
    ],
)
def test_rows_that_cannot_be_learned(tmp_path, word_tokenizer, row, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, word_tokenizer, dataset=Dataset.from_list([row]))


def test_tokenized_rows_and_a_second_text_column(tmp_path, word_tokenizer, make_trainer):
    tokenized = Dataset.from_list([{"input_ids": list(range(5, 105)), "prompt_length": 3, "example_id": 77}])
    row = make_trainer(tmp_path, word_tokenizer, dataset=tokenized).train_dataset[0]
    assert row == {"input_ids": list(range(5, 69)), "prompt_length": 3, "example_id": 77}
    mixed = Dataset.from_list([{"prompt": "Sam has 3 books.", "text": "So it is 3."}])
    row = make_trainer(tmp_path, word_tokenizer, dataset=mixed).train_dataset[0]
    assert row["prompt_length"] == 0 and row["input_ids"] == [*word_tokenizer("So it is 3.")["input_ids"], EOS]


def test_wrong_types(tmp_path, word_tokenizer, make_trainer, small_model):
    with pytest.raises(ValueError, match="`args` is a TrainingArguments"):
        MaskedDiffusionTrainer(small_model(), TrainingArguments(str(tmp_path)), processing_class=word_tokenizer)
    with pytest.raises(ValueError, match="`train_dataset` is a list"):
        make_trainer(tmp_path, word_tokenizer, dataset=rows())


def test_grouping_by_length_saves_padding(tmp_path, word_tokenizer):
    lengths = torch.randint(1, 60, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = Dataset.from_list([{"prompt": "Sam", "completion": " so" * length} for length in lengths])

    def share_of_padding(strategy):
        trainer = build_trainer(
            tmp_path, word_tokenizer, FAMILIES["llada"].small(), dataset,
            max_length=None, train_sampling_strategy=strategy,
        )  # fmt: skip
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)

    assert share_of_padding("group_by_length") < 0.1 < 0.25 < share_of_padding("random")
