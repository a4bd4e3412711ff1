"""The distillation trainer: its fused loss against the plain one, and that it learns, decodes, resumes and adapts."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig

from dparallel.hub_cards import merge_adapter
from dparallel.trainer import CertaintyForcingConfig, CertaintyForcingTrainer, MaskedDiffusionConfig
from dparallel.trainer.losses import certainty_forcing_loss
from dparallel.trainer.masking import complementary_masks, response_mask
from tests.families import FAMILIES
from tests.trainer.test_masked_diffusion_trainer import EOS, MASK, any_model, rows, weights_after


def settings(tmp_path, **changes):
    defaults = {"output_dir": str(tmp_path), "report_to": "none", "save_strategy": "no", "use_cpu": True}
    defaults |= {"max_length": 64, "per_device_train_batch_size": 8, "logging_steps": 1, "disable_tqdm": True}
    defaults |= {"masking": "block", "block_length": 16, "certainty_weight": 2.0}
    return CertaintyForcingConfig(**(defaults | changes))


def build_trainer(tmp_path, tokenizer, model, dataset=None, **changes):
    kinds = {key: changes.pop(key) for key in ("peft_config", "eval_dataset", "judge") if key in changes}
    return CertaintyForcingTrainer(
        model=model,
        args=settings(tmp_path, **changes),
        train_dataset=Dataset.from_list(rows()) if dataset is None else dataset,
        processing_class=tokenizer,
        **kinds,
    )


@pytest.fixture
def make_trainer(small_model):
    def make(tmp_path, tokenizer, model=None, dataset=None, **changes):
        return build_trainer(tmp_path, tokenizer, small_model() if model is None else model, dataset, **changes)

    return make


def trajectories(tokenizer, count=12):
    """Rows as `generate_trajectories` writes them, in a made-up order."""
    result = []
    for i, row in enumerate(rows(count)):
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [*tokenizer(row["completion"])["input_ids"], EOS]
        steps = [(7 * j + i) % len(response) for j in range(len(response))]
        result.append({"input_ids": prompt + response, "prompt_length": len(prompt), "unmasking_step": steps})
    return Dataset.from_list(result)


# --- loss ------------------------------------------------------------------------------------------------------------


def plain_loss(model, batch, args, shift):
    """View by view and row by row, from logits of whole sequences."""
    total = 0
    for i in range(len(batch["input_ids"])):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        masks = complementary_masks(
            response_mask(row["prompt_length"], row["attention_mask"], shift),
            None if args.masking == "response" else args.block_length,
            (args.mask_ratio, args.mask_ratio),
            row["unmasking_step"] if args.masking == "trajectory" else None,
            seed=args.seed, epoch=0, example_id=row["example_id"],
        )  # fmt: skip
        for hidden, scored in zip(masks.hidden, masks.scored, strict=True):
            noisy = row["input_ids"].masked_fill(hidden, MASK)
            logits = model(input_ids=noisy, attention_mask=row["attention_mask"]).logits
            logits = logits.roll(shift, dims=1)  # row i predicts token i; the first token is never scored
            losses = certainty_forcing_loss(logits, row["input_ids"], scored[None], args.certainty_temperature)
            total = total + args.trajectory_weight * losses[0] + args.certainty_weight * losses[1]
    return total / len(batch["input_ids"])


@pytest.mark.parametrize("masking", ["block", "response", "trajectory"])
@pytest.mark.parametrize("name", [*FAMILIES, "shifted"])
def test_fused_loss_equals_the_plain_one(tmp_path, word_tokenizer, name, masking):
    model = any_model(name)
    changes = {"masking": masking, "max_steps": 30, "learning_rate": 1e-2, "trajectory_weight": 0.7}
    trainer = build_trainer(tmp_path, word_tokenizer, model, trajectories(word_tokenizer), **changes)
    trainer.train()  # until some predictions are right
    trainer._epoch = 0
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    loss = trainer.compute_loss(model, batch)
    expected = plain_loss(model, batch, trainer.args, model.logits_shift)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_no_logits_of_whole_sequences(tmp_path, word_tokenizer, make_trainer):
    """At most a block's worth of positions goes through the head, both views in one call."""
    trainer, shapes = make_trainer(tmp_path, word_tokenizer), []
    trainer.model.get_output_embeddings().register_forward_hook(lambda *call: shapes.append(call[2].shape))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    trainer.compute_loss(trainer.model, batch)
    assert len(shapes) == 1 and shapes[0][0] == 12 and shapes[0][1] <= 16


def test_one_view_only(tmp_path, word_tokenizer, make_trainer):
    both = make_trainer(tmp_path, word_tokenizer)
    batch = both.data_collator([both.train_dataset[i] for i in range(6)])
    half = make_trainer(tmp_path, word_tokenizer, model=both.model, complementary=False)
    assert 0 < half.compute_loss(half.model, batch) < both.compute_loss(both.model, batch)


def test_a_batch_without_anything_to_score(tmp_path, word_tokenizer, make_trainer):
    """As at the first step of a mask ratio that grows from 0."""
    trainer = make_trainer(
        tmp_path, word_tokenizer, complementary=False, mask_ratio_start=0.0, max_steps=3, learning_rate=1e-3
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert losses[0] == 0 < losses[1]


@pytest.mark.parametrize("count", [8, 10])
def test_micro_batches_make_the_same_step(tmp_path, word_tokenizer, make_trainer, count):
    results = [
        weights_after(
            make_trainer(
                tmp_path, word_tokenizer, dataset=Dataset.from_list(rows(count)), per_device_train_batch_size=size,
                gradient_accumulation_steps=-(-count // size), max_steps=4, learning_rate=1e-3, optim="sgd",
            )
        )
        for size in (count, 8, 3, 1)
    ]  # fmt: skip
    for result in results[1:]:
        torch.testing.assert_close(results[0], result, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_and_autocast(tmp_path, word_tokenizer, make_trainer):
    """Checkpointing changes nothing, bfloat16 little."""
    options = {"max_steps": 3, "learning_rate": 1e-3}
    plain = weights_after(make_trainer(tmp_path, word_tokenizer, **options))
    checkpointed = weights_after(make_trainer(tmp_path, word_tokenizer, gradient_checkpointing=True, **options))
    torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)
    rounded = weights_after(make_trainer(tmp_path, word_tokenizer, bf16=True, **options))
    assert 0 < (rounded - plain).abs().mean() < 2e-4


def test_a_loss_that_is_not_finite(tmp_path, word_tokenizer, family, make_trainer, small_model):
    model = small_model()
    model.get_submodule(family.norm).weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite at step 0.*Lower `learning_rate"):
        make_trainer(tmp_path, word_tokenizer, model=model, max_steps=2).train()


# --- training --------------------------------------------------------------------------------------------------------

METRICS = "trajectory_loss certainty_loss masked_accuracy mean_confidence mean_entropy unmasked_share".split()


@pytest.mark.parametrize("masking", ["block", "trajectory"])
def test_training_logs_its_terms_and_decodes(tmp_path, word_tokenizer, masking, make_trainer):
    dataset = trajectories(word_tokenizer)
    examples = Dataset.from_list([{**row, "n": i} for i, row in enumerate(rows(5))])
    examples = examples.map(lambda row: trajectories(word_tokenizer, 5)[row["n"]])
    asked = []

    def judge(row):
        asked.append(row)
        return row["n"] < 2

    trainer = make_trainer(
        tmp_path, word_tokenizer, dataset=dataset, eval_dataset=examples, judge=judge, masking=masking, max_steps=60,
        learning_rate=1e-2, eval_strategy="steps", eval_steps=30, save_strategy="steps", save_steps=30,
        load_best_model_at_end=True, metric_for_best_model="eval_nfe",
        eval_decoding_samples=4, eval_max_new_tokens=16, eval_decoding_batch_size=3,
    )  # fmt: skip
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "trajectory_loss" in entry]
    first, last = history[0], history[-1]
    assert first["masked_accuracy"] < 0.1 < 0.6 < last["masked_accuracy"]
    assert last["trajectory_loss"] < first["trajectory_loss"] / 2 and last["unmasked_share"] > first["unmasked_share"]
    for entry in (first, last):
        assert entry["loss"] == pytest.approx(entry["trajectory_loss"] + 2 * entry["certainty_loss"], rel=1e-3)
        assert 0 <= entry["mean_entropy"] and 0 < entry["mean_confidence"] <= 1
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2 and all(f"eval_{name}" in evaluations[0] for name in METRICS)
    assert evaluations[-1]["eval_decoding_accuracy"] == 0.5
    assert 1 <= evaluations[-1]["eval_nfe"] <= 16 and 0 < evaluations[-1]["eval_tpf"] <= 16
    assert trainer.state.best_metric == min(entry["eval_nfe"] for entry in evaluations)
    assert [row["n"] for row in asked] == [0, 1, 2, 3] * 2
    # What was decoded is what generate() gives.
    output = trainer.model.generate(
        torch.tensor([word_tokenizer(asked[-1]["prompt"])["input_ids"]]), max_new_tokens=16,
        unmasking="entropy_threshold", threshold=0.5, eos_token_id=EOS, return_dict_in_generate=True,
    )  # fmt: skip
    assert output.num_forward_passes.item() >= 1


def test_masks_grow_with_training(tmp_path, word_tokenizer, small_model):
    seen = []

    class Spy(CertaintyForcingTrainer):
        def draw_masks(self, inputs, response, **randomness):
            masks = super().draw_masks(inputs, response, **randomness)
            seen.append((masks.ratio[0].item(), masks.span_length.max().item()))
            return masks

    args = settings(
        tmp_path, max_steps=4, mask_ratio=0.8, mask_ratio_start=0.0, block_length=16, block_length_start=8,
        gradient_accumulation_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = Spy(small_model(), args, train_dataset=Dataset.from_list(rows()), processing_class=word_tokenizer)
    trainer.train()
    assert [ratio for ratio, _ in seen] == pytest.approx([0.0, 0.0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6])
    assert [length for _, length in seen] == [8, 8, 10, 10, 12, 12, 14, 14]
    seen.clear()
    trainer.evaluate(Dataset.from_list(rows(3)))
    assert seen == [(pytest.approx(0.8), 16)]


def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path, word_tokenizer, make_trainer, small_model):
    options = {"max_steps": 12, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 7}
    options |= {"mask_ratio_start": 0.1}
    unbroken = weights_after(make_trainer(tmp_path / "a", word_tokenizer, **options))
    trainer = make_trainer(tmp_path / "b", word_tokenizer, model=small_model(seed=5), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-7"))
    resumed = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    assert torch.equal(unbroken, resumed)


@pytest.mark.parametrize("kind", ["all weights", "LoRA", "IA3"])
def test_what_is_saved_decodes_as_it_was_trained_to(tmp_path, word_tokenizer, make_trainer, small_model, kind):
    adapters = {"LoRA": LoraConfig(r=2), "IA3": IA3Config(target_modules=["q_proj"], feedforward_modules=[])}
    model = small_model()
    model.generation_config.update(unmasking="confidence", steps=8)
    options = {"max_steps": 1, "unmasking": "entropy_bound", "threshold": 0.2, "peft_config": adapters.get(kind)}
    saved = tmp_path / "out"
    trainer = make_trainer(saved, word_tokenizer, model=model, **options)
    trainer.train()
    trainer.save_model()
    if kind == "all weights":
        config = type(model).from_pretrained(saved).generation_config
    else:
        small_model().save_pretrained(tmp_path / "base")
        kwargs = {"base_model": str(tmp_path / "base"), "model_init_kwargs": {"dtype": "float32"}}
        config = merge_adapter(saved, tmp_path / "merged", word_tokenizer, **kwargs).generation_config
    assert (config.unmasking, config.threshold, config.steps) == ("entropy_bound", 0.2, None)


def test_evaluation_of_other_and_of_several_datasets(tmp_path, word_tokenizer, make_trainer):
    def judge(row):
        return row["mine"]

    first = Dataset.from_list([{**row, "mine": True} for row in rows(4)])
    other = Dataset.from_list([{**row, "mine": False} for row in rows(4)])
    options = {"eval_decoding_samples": 2, "eval_max_new_tokens": 8, "judge": judge}
    trainer = make_trainer(tmp_path, word_tokenizer, eval_dataset={"a": first, "b": other}, **options)
    metrics = trainer.evaluate()
    assert metrics["eval_a_decoding_accuracy"] == 1.0 and metrics["eval_b_decoding_accuracy"] == 0.0
    trainer = make_trainer(tmp_path, word_tokenizer, eval_dataset=first, **options)
    assert trainer.evaluate()["eval_decoding_accuracy"] == 1.0
    assert trainer.evaluate(other)["eval_decoding_accuracy"] == 0.0
    assert trainer.predict(other).metrics["test_decoding_accuracy"] == 0.0
    assert trainer.predict(first).metrics["test_decoding_accuracy"] == 1.0
    with pytest.raises(ValueError, match="evaluation requires an eval_dataset"):
        make_trainer(tmp_path, word_tokenizer, **options).evaluate()


# --- what was published for a family ---------------------------------------------------------------------------------


def test_settings_left_open_are_the_familys(tmp_path, word_tokenizer, family, small_model):
    def trained_with(**changes):
        args = CertaintyForcingConfig(str(tmp_path), report_to="none", use_cpu=True, **changes)
        dataset = Dataset.from_list(rows(3))
        trainer = CertaintyForcingTrainer(small_model(), args, train_dataset=dataset, processing_class=word_tokenizer)
        assert (args.masking, args.max_length) == (changes.get("masking"), changes.get("max_length", 0))  # as given
        lengths = {(len(row["input_ids"]), row["prompt_length"]) for row in trainer.train_dataset}
        args = trainer.args
        return (args.masking, args.certainty_weight, args.max_length, args.response_length), lengths

    found, lengths = trained_with()
    is_dream = family.name == "dream"  # nothing was published for SDAR, which takes the defaults: LLaDA's
    assert found == (("response", 1.0, None, 256) if is_dream else ("block", 2.0, 384, None))
    assert all(total - prompt == 256 if is_dream else total == 384 for total, prompt in lengths)
    found, lengths = trained_with(masking="block", certainty_weight=0.0, response_length=40)
    assert found == ("block", 0.0, None if is_dream else 384, 40)
    assert all(total - prompt == 40 for total, prompt in lengths)
    found, lengths = trained_with(max_length=50)
    assert found[2:] == (50, None) and {total for total, _ in lengths} == {50}
    found, lengths = trained_with(max_length=None)  # no limit, and one end-of-text
    assert found[2:] == (None, None) and len(lengths) > 1


def test_families_without_published_settings_are_told_so(tmp_path, word_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        build_trainer(tmp_path, word_tokenizer, any_model("shifted"))
        assert "Nothing was published" not in caplog.text  # nothing was left open
        args = CertaintyForcingConfig(str(tmp_path), report_to="none", use_cpu=True)
        CertaintyForcingTrainer(
            any_model("shifted"), args, train_dataset=Dataset.from_list(rows(3)), processing_class=word_tokenizer
        )
    assert "Nothing was published for the model type 'shifted': LLaDA's settings are used" in caplog.text


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masking": "blocks"}, "`masking='blocks'` is not allowed"),
        ({"block_length": None}, "`block_length=None` is not allowed"),
        ({"block_length": 0}, "`block_length=0` is not allowed"),
        ({"block_length_start": 0}, "`block_length_start=0` is not allowed"),
        ({"mask_ratio": 0.0}, "`mask_ratio=0.0` is not allowed: it must be above 0 and at most 1"),
        ({"mask_ratio": 1.5}, "`mask_ratio=1.5` is not allowed"),
        ({"mask_ratio_start": -0.5}, "`mask_ratio_start=-0.5` is not allowed"),
        ({"mask_ratio_low": 2.0}, "`mask_ratio_low=2.0` is not allowed"),
        ({"certainty_temperature": 0.0}, "`certainty_temperature=0.0` is not allowed"),
        ({"certainty_weight": -1.0}, "`certainty_weight=-1.0` is not allowed"),
        ({"trajectory_weight": -1.0}, "`trajectory_weight=-1.0` is not allowed"),
        ({"unmasking": "confidence"}, "`unmasking='confidence'` is not allowed"),
        ({"unmasking": "learned_filter"}, "`unmasking='learned_filter'` is not allowed"),
        ({"unmasking": "confidence_threshold", "threshold": 1.5}, "`threshold=1.5` is not allowed"),
        ({"eval_decoding_samples": -1}, "`eval_decoding_samples=-1` is not allowed"),
        ({"eval_max_new_tokens": 0}, "`eval_max_new_tokens=0` is not allowed"),
        ({"max_length": -1}, "`max_length=-1` is not allowed"),
        ({"response_length": 0}, "`response_length=0` is not allowed"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1` is not allowed"),
    ],
)
def test_wrong_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_what_is_offered_works():
    """No field of the configuration is refused for whatever value, as one would be that another trainer is for."""
    assert "loss_weighting" not in CertaintyForcingConfig.__dataclass_fields__
    assert "mask_ratio" not in MaskedDiffusionConfig.__dataclass_fields__
    with pytest.raises(TypeError, match="loss_weighting"):
        CertaintyForcingConfig("out", loss_weighting="uniform")


def test_wrong_inputs(tmp_path, word_tokenizer, make_trainer, small_model):
    with pytest.raises(ValueError, match="`block_length_start=8` is not allowed: it must be None with `masking='resp"):
        make_trainer(tmp_path, word_tokenizer, masking="response", block_length_start=8)
    with pytest.raises(ValueError, match="must be a CertaintyForcingConfig"):
        CertaintyForcingTrainer(small_model(), MaskedDiffusionConfig(str(tmp_path)), processing_class=word_tokenizer)
    with pytest.raises(ValueError, match="`train_dataset` has no `unmasking_step`"):
        make_trainer(tmp_path, word_tokenizer, masking="trajectory")
    with pytest.raises(ValueError, match="'decoding_accuracy'` needs a `judge`"):
        make_trainer(tmp_path, word_tokenizer, metric_for_best_model="decoding_accuracy")
    for name in ("eval_decoding_accuracy", "nfe", "eval_tpf"):
        with pytest.raises(ValueError, match=f"`metric_for_best_model='{name}'` needs `eval_decoding_samples` of"):
            make_trainer(tmp_path, word_tokenizer, metric_for_best_model=name, judge=bool)
    text = Dataset.from_list([{"text": "So it is 3."}])
    for dataset in (text, {"a": text}):
        with pytest.raises(ValueError, match=r"`eval_decoding_samples=2` needs the column `prompt` or `messages`"):
            make_trainer(tmp_path, word_tokenizer, eval_dataset=dataset, eval_decoding_samples=2)
    with pytest.raises(ValueError, match="`eval_dataset` has no `unmasking_step`"):
        dataset = trajectories(word_tokenizer)
        make_trainer(tmp_path, word_tokenizer, dataset=dataset, eval_dataset=text, masking="trajectory")
    with pytest.raises(ValueError, match=r"has the columns \['answer', 'question'\]"):
        make_trainer(tmp_path, word_tokenizer, dataset=Dataset.from_list([{"question": "a", "answer": "b"}]))
