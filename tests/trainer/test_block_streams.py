"""Training of block-causal models: all blocks of a row at once, held to one pass for each block."""

import pytest
import torch
from datasets import Dataset

from dparallel.trainer import (
    CertaintyForcingConfig,
    CertaintyForcingTrainer,
    MaskedDiffusionConfig,
    MaskedDiffusionTrainer,
)
from dparallel.trainer.block_streams import stream_mask
from dparallel.trainer.losses import certainty_forcing_losses, masked_diffusion_losses
from dparallel.trainer.masking import complementary_masks, random_masks, response_mask
from dparallel.trainer.tokenization import lay_out_tokens, tokenize_example
from tests.families import ALL_FAMILIES
from tests.trainer.test_certainty_forcing_trainer import trajectories
from tests.trainer.test_masked_diffusion_trainer import EOS, MASK, rows

RANDOM = {"seed": 5, "epoch": 2}
TRAINERS = {
    "masked": (MaskedDiffusionTrainer, MaskedDiffusionConfig),
    "certainty": (CertaintyForcingTrainer, CertaintyForcingConfig),
}


@pytest.fixture(params=ALL_FAMILIES)
def family(request):
    return ALL_FAMILIES[request.param]


def make_trainer(tmp_path, tokenizer, kind, model, dataset=None, **changes):
    trainer, config = TRAINERS[kind]
    settings = {"output_dir": str(tmp_path), "report_to": "none", "save_strategy": "no", "use_cpu": True}
    settings |= {"max_length": 64, "per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True}
    dataset = Dataset.from_list(rows()) if dataset is None else dataset
    return trainer(model=model, args=config(**(settings | changes)), train_dataset=dataset, processing_class=tokenizer)


# --- the pass --------------------------------------------------------------------------------------------------------


def logits_block_by_block(model, ids, hidden, block_length):
    """Logits (T, V) that predict each token of a row, (T,), in a view that hides some: for each block a pass over the
    row up to its end, in which all before it is shown."""
    found = []
    for begin in range(0, len(ids), block_length):
        stop = min(begin + block_length, len(ids))
        shown = torch.cat((ids[:begin], ids[begin:stop].masked_fill(hidden[begin:stop], MASK)))
        logits = model(input_ids=shown[None]).logits[0]
        # What is before a row predicts nothing that is ever learned.
        logits = torch.cat((logits[:1].expand(model.logits_shift, -1), logits))
        found.append(logits[begin:stop])
    return torch.cat(found)


def slow_loss(trainer, model, batch):
    """Row by row, view by view and block by block."""
    args, total = trainer.args, 0
    for i in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][i].sum())
        ids, row = batch["input_ids"][i, :length], {name: each[i : i + 1] for name, each in batch.items()}
        masks = trainer.draw_masks(
            {**row, "unmasking_step": row["unmasking_step"][:, :length]} if "unmasking_step" in row else row,
            response_mask(row["prompt_length"], torch.ones(1, length), model.logits_shift),
            seed=args.seed, epoch=0, example_id=row["example_id"],
        )  # fmt: skip
        for hidden, scored, ratio in zip(masks.hidden, masks.scored, masks.ratio, strict=True):
            logits = logits_block_by_block(model, ids, hidden, model.config.block_causal_length)[None]
            if isinstance(trainer, CertaintyForcingTrainer):
                losses = certainty_forcing_losses(logits, ids[None], scored[None], args.certainty_temperature)
                total = total + args.trajectory_weight * losses[0] + args.certainty_weight * losses[1]
            else:
                total = total + masked_diffusion_losses(
                    logits, ids[None], scored[None], ratio[None], masks.span_length, args.loss_weighting
                )
    return total.squeeze() / len(batch["input_ids"])


@pytest.mark.parametrize("block_length", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("masked", {"loss_weighting": "inverse_t"}),
        ("masked", {"loss_weighting": "uniform", "response_length": 20}),
        ("certainty", {"mask_ratio_low": 0.2}),
        ("certainty", {"masking": "trajectory", "mask_ratio": 0.7, "certainty_temperature": 1.0}),
        ("certainty", {"complementary": False}),
    ],
)
def test_all_blocks_at_once_equal_one_at_a_time(tmp_path, word_tokenizer, family, kind, changes, block_length):
    model = family.small(block_causal_length=block_length)
    with torch.no_grad():  # so that some predictions are right, and gradients are not nearly zero
        for weight in model.parameters():
            weight.mul_(1.5)
    trainer = make_trainer(tmp_path, word_tokenizer, kind, model, trajectories(word_tokenizer), **changes)
    trainer._epoch = 0
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 1, 2)])
    assert not batch["attention_mask"].all() or "response_length" in changes
    loss, expected = trainer.compute_loss(model, batch), slow_loss(trainer, model, batch)
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)
    weights = list(model.parameters())
    found, slow = (torch.autograd.grad(each, weights, allow_unused=True) for each in (loss, expected))
    pairs = [(a, b) for a, b in zip(found, slow, strict=True) if a is not None or b is not None]
    found, slow = (torch.cat([each.flatten() for each in side]) for side in zip(*pairs, strict=True))
    assert (found - slow).norm() <= 1e-5 * slow.norm()


def test_who_sees_whom():
    """By a loop, with two views, a clean stream of 7 columns in blocks of 3, and views that begin with the second."""
    columns = [*range(7), *range(3, 7), *range(3, 7)]
    views = [0] * 7 + [1] * 4 + [2] * 4
    is_real = torch.ones(2, 15, dtype=torch.bool)
    is_real[1, [6, 10, 14]] = False
    found = stream_mask(torch.tensor(columns) // 3, torch.tensor(views), is_real)
    for row in range(2):
        for query in range(15):
            for key in range(15):
                before = views[key] == 0 and columns[key] // 3 < columns[query] // 3
                beside = views[key] == views[query] and columns[key] // 3 == columns[query] // 3
                assert found[row, 0, query, key] == ((before or beside) and is_real[row, key])


def test_views_begin_where_something_is_learned(tmp_path, word_tokenizer):
    model, widths = ALL_FAMILIES["llada"].small(block_causal_length=4), []
    trainer = make_trainer(tmp_path, word_tokenizer, "masked", model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model.get_input_embeddings().register_forward_hook(lambda *call: widths.append(call[2].shape[1]))
    trainer.compute_loss(model, batch)
    width, first = batch["input_ids"].shape[1], int(batch["prompt_length"].min()) // 4 * 4
    assert first > 0 and widths == [2 * width - first]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_agrees(tmp_path, word_tokenizer, implementation):
    model = ALL_FAMILIES["sdar"].small(block_causal_length=4)
    trainer = make_trainer(tmp_path, word_tokenizer, "certainty", model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    expected = trainer.compute_loss(model, batch)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected, atol=1e-5, rtol=1e-5)


def test_attention_that_cannot_take_such_masks_is_refused(tmp_path, word_tokenizer):
    model = ALL_FAMILIES["dream"].small(block_causal_length=4)
    trainer = make_trainer(tmp_path, word_tokenizer, "masked", model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2'.* cannot attend by blocks"):
        trainer.compute_loss(model, batch)


def test_rows_that_nothing_predicts_are_dropped(tmp_path, word_tokenizer):
    """Of an empty text only the end-of-text is left, and with a shift of one nothing is before it."""
    dataset = Dataset.from_list([{"text": "Sam has 3 books."}, {"text": ""}])
    for name, count in (("dream", 1), ("llada", 2)):
        model = ALL_FAMILIES[name].small(block_causal_length=4)
        trainer = make_trainer(tmp_path, word_tokenizer, "masked", model, dataset, max_steps=1)
        assert len(trainer.train_dataset) == count
        trainer.train()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TRAINERS)
def test_flex_attention_agrees(tmp_path, word_tokenizer, kind):
    model = ALL_FAMILIES["dream"].small(block_causal_length=4, hidden_size=128).cuda()
    trainer = make_trainer(tmp_path, word_tokenizer, kind, model, use_cpu=False)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    batch = {name: each.cuda() for name, each in batch.items()}
    losses = []
    for implementation in ("block_sdpa", "sdpa"):
        model.set_attn_implementation(implementation)
        losses.append(trainer.compute_loss(model, batch))
    gradients = [torch.autograd.grad(loss, model.model.norm.weight)[0] for loss in losses]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-2)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_each_block_has_its_own_ratio():
    response = torch.ones(400, 64, dtype=torch.bool)
    masks = random_masks(response, 16, example_id=torch.arange(400), **RANDOM)
    blocks = masks.ratio.view(400, 4, 16)
    assert (blocks == blocks[:, :, :1]).all() and len(blocks[:, :, 0].unique()) > 1500
    hidden = masks.hidden.view(400, 4, 16).float().mean(dim=2)
    assert (hidden - blocks[:, :, 0]).mean().abs() < 0.01
    assert (hidden - blocks[:, :, 0]).abs().max() < 0.6


@pytest.mark.parametrize("ordered", [False, True])
def test_views_of_all_blocks_are_complementary_and_do_not_depend_on_the_width(ordered):
    response = torch.zeros(50, 40, dtype=torch.bool)
    response[:, 5:37] = True
    ids = torch.arange(50)
    steps = torch.randint(-1, 9, (50, 40), generator=torch.Generator().manual_seed(0)) if ordered else None
    masks = complementary_masks(response, None, (0.2, 0.9), steps, 8, example_id=ids, **RANDOM)
    first, second = masks.scored.chunk(2)
    assert torch.equal(first | second, response) and not (first & second).any()
    assert (masks.hidden.chunk(2)[1] == (response if ordered else second)).all()
    wider = torch.nn.functional.pad(response, (0, 9))
    steps = None if steps is None else torch.nn.functional.pad(steps, (0, 9), value=-1)
    again = complementary_masks(wider, None, (0.2, 0.9), steps, 8, example_id=ids, **RANDOM)
    for a, b in zip(masks[:3], again[:3], strict=True):
        assert torch.equal(a, b[:, :40])


def test_the_order_of_writing_counts_in_each_block():
    response = torch.zeros(20, 30, dtype=torch.bool)
    response[:, 3:29] = True
    steps = torch.randint(-1, 12, (20, 30), generator=torch.Generator().manual_seed(1))
    masks = complementary_masks(response, None, (0.3, 0.8), steps, 6, example_id=torch.arange(20), **RANDOM)
    for row in range(20):
        for begin in range(0, 30, 6):
            places = [i for i in range(begin, begin + 6) if response[row, i]]
            order = sorted(places, key=lambda i: (99 if steps[row, i] < 0 else int(steps[row, i]), i))
            shown = len(order) - round(float(masks.ratio[row, begin] * len(order)))
            assert masks.hidden[row, begin : begin + 6].nonzero().flatten().add(begin).tolist() == sorted(
                order[shown:]
            )


# --- rows ------------------------------------------------------------------------------------------------------------


def test_answers_are_filled_up_to_the_end_of_their_block(word_tokenizer):
    row = {"input_ids": [3, 4, 5, 6, 7, EOS], "prompt_length": 3}

    def laid_out(*lengths):
        return lay_out_tokens(row, EOS, *lengths)["input_ids"][3:]

    assert laid_out(64, None, 4) == [6, 7, EOS, EOS, EOS]  # to column 8
    assert laid_out(None, None, 4) == [6, 7, EOS, EOS, EOS]
    assert laid_out(7, None, 4) == [6, 7, EOS, EOS]
    assert laid_out(64, None, 6) == laid_out(64, None, 1) == [6, 7, EOS]
    assert laid_out(64, 10, 4) == [6, 7] + [EOS] * 8  # asked for
    assert laid_out(None, None, 4, 7) == [6, 7, EOS, EOS]  # the model reads no more
    steps = lay_out_tokens({**row, "unmasking_step": [0, 1, 2]}, EOS, 64, None, 4)["unmasking_step"]
    assert steps == [-1, -1, -1, 0, 1, 2, -1, -1]
    example = {"prompt": "Sam has 3", "completion": " books."}
    assert len(tokenize_example(example, word_tokenizer, 64, None, 16)["input_ids"]) == 16


@pytest.mark.journey
@pytest.mark.parametrize("kind", TRAINERS)
def test_it_learns_and_decodes(tmp_path, word_tokenizer, kind):
    """A model that was trained so writes what it has learned, with its exact cache as without one."""
    model = ALL_FAMILIES["dream"].small(block_causal_length=4, hidden_size=64)
    dataset = Dataset.from_list(rows(4))
    trainer = make_trainer(tmp_path, word_tokenizer, kind, model, dataset, max_steps=200, learning_rate=1e-2)
    trainer.train()
    accuracies = [entry["masked_accuracy"] for entry in trainer.state.log_history[-21:-1]]
    assert sum(accuracies) / len(accuracies) > 0.8
    row = trainer.train_dataset[0]
    prompt, answer = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
    settings = {"max_new_tokens": len(answer), "unmasking": "confidence", "steps": len(answer)}
    for cache in ("exact", "none"):
        found = model.eval().generate(torch.tensor([prompt]), block_cache=cache, **settings)[0, len(prompt) :].tolist()
        assert found[: answer.index(EOS)] == answer[: answer.index(EOS)]


@pytest.mark.parametrize("kind", TRAINERS)
def test_micro_batches_and_interrupted_runs_end_alike(tmp_path, word_tokenizer, kind):
    def weights(model):
        return torch.cat([each.detach().flatten() for each in model.parameters()])

    def trainer(name, **changes):
        model = ALL_FAMILIES["dream"].small(block_causal_length=6)
        settings = {"max_steps": 4, "learning_rate": 1e-2, "optim": "sgd", "save_strategy": "steps", "save_steps": 2}
        dataset = Dataset.from_list(rows(10))
        return make_trainer(tmp_path / str(name), word_tokenizer, kind, model, dataset, **(settings | changes))

    found = []
    for size in (10, 4, 1):
        each = trainer(size, per_device_train_batch_size=size, gradient_accumulation_steps=-(-10 // size))
        each.train()
        found.append(weights(each.model))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=1e-6, rtol=1e-5)
    resumed = trainer("resumed", per_device_train_batch_size=10)
    resumed.train(resume_from_checkpoint=str(tmp_path / "10" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), found[0])


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("masked", {"block_length": 8}, "`block_length=8` is not allowed: it must be None or 4, the block length"),
        ("certainty", {"block_length": 8}, "`block_length=8` is not allowed: it must be 4, the block length"),
        ("certainty", {"masking": "response"}, "`masking='response'` is not allowed: it must be 'block' or 'traj"),
        ("certainty", {"block_length_start": 2}, "`block_length_start=2` is not allowed: it must be None for"),
        ("masked", {"max_length": 9999, "response_length": 2000}, "the model reads at most 512"),
    ],
)
def test_bad_settings_are_named(tmp_path, word_tokenizer, kind, changes, message):
    model = ALL_FAMILIES["dream"].small(block_causal_length=4)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, word_tokenizer, kind, model, **changes)


def test_block_length_is_the_models(tmp_path, word_tokenizer):
    for kind in TRAINERS:
        trainer = make_trainer(tmp_path, word_tokenizer, kind, ALL_FAMILIES["dream"].small(block_causal_length=4))
        assert trainer.args.block_length == 4
    assert trainer.args.decoding["block_length"] == 4
    assert (trainer.args.masking, trainer.args.certainty_weight) == ("block", 2.0)
