"""The learned filter: alone, beside its model, and in the loop."""

import subprocess
import sys

import pytest
import torch

from dparallel.modeling import TokenStatistics, UnmaskingFilter, UnmaskingFilterConfig
from tests.families import MOSTLY_SLOW
from tests.modeling.test_block_cache import CACHES, name_of
from tests.modeling.test_captured_step import assert_same, both, device, prompts  # noqa: F401
from tests.modeling.test_generation import EOS, padded_batch

SETTINGS = {"max_new_tokens": 22, "block_length": 6, "unmasking": "learned_filter", "threshold": 0.5}


def make_filter(seed=0, **changes):
    torch.manual_seed(seed)
    unmasking_filter = UnmaskingFilter(UnmaskingFilterConfig(**({"block_length": 6} | changes))).eval()
    for parameter in unmasking_filter.parameters():
        parameter.data *= 3  # opinions that differ
    return unmasking_filter


def statistics(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(0, 20, (rows, length), generator=generator)
    masked = torch.rand(rows, length, generator=generator) < 0.6
    return TokenStatistics(token, *torch.rand(3, rows, length, generator=generator)), masked


def test_default_is_the_published_one():
    unmasking_filter = UnmaskingFilter(UnmaskingFilterConfig())
    assert sum(parameter.numel() for parameter in unmasking_filter.parameters()) == 2112


def test_what_it_computes():
    """By hand, for one feature and for two, with a block that is shorter than its own."""
    found, masked = statistics(3, 4)
    for features in (["confidence"], ["confidence", "masked"]):
        unmasking_filter = make_filter(features=features)
        first, _, second = unmasking_filter.layers
        for row in range(3):
            inputs = [*found.confidence[row].tolist(), 1.0, 1.0]
            inputs += [*masked[row].float().tolist(), 0.0, 0.0] if len(features) == 2 else []
            hidden = (first.weight @ torch.tensor(inputs) + first.bias).clamp(min=0)
            expected = (second.weight @ hidden + second.bias).sigmoid()[:4]
            torch.testing.assert_close(unmasking_filter.finality(found, masked)[row], expected)


def test_log_odds():
    confidence = torch.tensor([[0.0, 0.25, 0.5, 0.9, 0.9999, 1.0]])
    first, _, second = (unmasking_filter := make_filter(features=["log_odds"])).layers
    inputs = torch.tensor([-10, -1.0986123, 0, 2.1972246, 9.2102404, 10]) / 10
    expected = second(first(inputs).clamp(min=0))
    torch.testing.assert_close(unmasking_filter(confidence)["logits"][0], expected, atol=1e-3, rtol=1e-3)


def test_words_and_digits(word_tokenizer):
    unmasking_filter = make_filter(features=["digit", "punctuation"], vocab_size=len(word_tokenizer))
    unmasking_filter.read_tokenizer(word_tokenizer)
    for text, digit, punctuation in (("7", 1, 0), (".", 0, 1), ("Tom", 0, 0)):
        token = word_tokenizer.encode(text, add_special_tokens=False)[-1]
        assert (unmasking_filter.digit[token], unmasking_filter.punctuation[token]) == (digit, punctuation), text


def test_loss_counts_masked_positions_alone():
    found, masked = statistics(5, 6)
    labels = (torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    output = make_filter()(found.confidence, masked=masked, labels=labels)
    probability = output["logits"].sigmoid()
    terms = torch.where(labels > 0, probability, 1 - probability).log()
    torch.testing.assert_close(output["loss"], -terms[masked].mean())


@pytest.mark.parametrize("cache", [{}, *CACHES], ids=name_of)
@pytest.mark.parametrize("eos", [{}, {"eos_threshold": 0.1}], ids=name_of)
def test_batch_equals_single(family, model, cache, eos):
    unmasking_filter = make_filter()
    rows = prompts(12, seed=3)
    settings = SETTINGS | cache | eos | {"pad_token_id": EOS, "eos_token_id": list(family.frequent)}
    settings |= {"unmasking_filter": unmasking_filter, "return_dict_in_generate": True}
    ids, mask = padded_batch(rows)
    batch = model.generate(ids, attention_mask=mask, **settings)
    for i, row in enumerate(rows):
        single = model.generate(torch.tensor([row]), **settings)
        assert torch.equal(batch.sequences[i, ids.shape[1] :], single.sequences[0, len(row) :])
        assert batch.num_forward_passes[i] == single.num_forward_passes[0]
        assert torch.equal(batch.unmasking_step[i], single.unmasking_step[0])


def test_replayed_steps_use_it(device, family):  # noqa: F811
    model = family.load().to(device.name)
    for seed in (0, 1):  # another filter takes other graphs
        unmasking_filter = make_filter(seed)
        for row in prompts(3, seed=5):
            ids = torch.tensor([row], device=device.name)
            assert_same(*both(model, ids, unmasking_filter=unmasking_filter, **SETTINGS, pad_token_id=EOS))


def test_replayed_steps_notice_that_its_weights_moved(device, family, prompt):  # noqa: F811
    model, unmasking_filter = family.load().to(device.name), make_filter()
    settings = {"unmasking_filter": unmasking_filter, **SETTINGS, "pad_token_id": EOS}
    for _ in range(2):
        model.generate(prompt.to(device.name), **settings)
    before = len(device.captures)
    for parameter in unmasking_filter.parameters():
        parameter.data = -parameter.data
    assert_same(*both(model, prompt.to(device.name), **settings))
    assert len(device.captures) > before


def test_it_is_found_whatever_the_checkpoint_decodes_by(family, prompt, tmp_path):
    model, unmasking_filter = family.load(), make_filter()
    model.set_unmasking_filter(unmasking_filter)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`push_to_hub=True` would leave the filter behind"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    again = family.model.from_pretrained(tmp_path)
    assert torch.equal(again.generate(prompt, **SETTINGS), model.generate(prompt, **SETTINGS))


def test_it_travels_with_its_model(family, prompt, tmp_path):
    model, unmasking_filter = family.load(), make_filter()
    given = model.generate(prompt, unmasking_filter=unmasking_filter, **SETTINGS)
    model.set_unmasking_filter(unmasking_filter)
    assert torch.equal(model.generate(prompt, **SETTINGS), given)
    model.generation_config.update(**SETTINGS)
    model.save_pretrained(tmp_path)
    again = family.model.from_pretrained(tmp_path)
    assert torch.equal(again.generate(prompt), given)
    assert not any("layers.0" in name and "unmasking" in name for name in again.state_dict())


@pytest.mark.parametrize("family", MOSTLY_SLOW, indirect=True)
@pytest.mark.journey
def test_remote_code_without_this_package(family, prompt, tmp_path):
    """Beside its model, and alone."""
    model, unmasking_filter = family.load(), make_filter()
    model.set_unmasking_filter(unmasking_filter)
    model.generation_config.update(**SETTINGS)
    model.save_pretrained(tmp_path / "model")
    unmasking_filter.save_pretrained(tmp_path / "filter")
    code = """
import sys, torch
sys.modules["dparallel"] = None
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model", trust_remote_code=True)
ids = torch.tensor(eval(sys.argv[2]))
print(model.generate(ids).tolist())
alone = AutoModel.from_pretrained(sys.argv[1] + "/filter", trust_remote_code=True)
print(sum(p.double().sum().item() for p in alone.parameters()))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(prompt.tolist())], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    tokens, total = result.stdout.strip().splitlines()[-2:]
    assert tokens == str(model.generate(prompt).tolist())
    assert float(total) == pytest.approx(sum(p.double().sum().item() for p in unmasking_filter.parameters()))


def test_a_checkpoint_that_lacks_its_filter_says_so(family, prompt, tmp_path, caplog):
    model = family.load()
    model.generation_config.update(**SETTINGS)
    model.save_pretrained(tmp_path)
    again = family.model.from_pretrained(tmp_path)
    assert "none was found in `unmasking_filter`" in caplog.text
    with pytest.raises(ValueError, match=r"`unmasking_filter=None` is not allowed: it must be an UnmaskingFilter"):
        again.generate(prompt)
    assert again.generate(prompt, unmasking="confidence_threshold").shape == (1, 31)


def test_wrong_arguments(model, prompt):
    unmasking_filter = make_filter()
    cases = (
        (SETTINGS | {"block_length": 8}, r"`block_length=8` is not allowed: it must be 6"),
        (SETTINGS | {"unmasking": "confidence_threshold"}, r"`unmasking_filter=.*left out with `unmasking='conf"),
        (SETTINGS | {"threshold": 1.5}, r"`threshold=1.5` is not allowed"),
    )
    for settings, message in cases:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            model.generate(prompt, unmasking_filter=unmasking_filter, **settings)
    with pytest.raises(ValueError, match="blocks of up to 6"):
        unmasking_filter(torch.rand(1, 7))
    for wrong, message in (
        ({"features": ["colour"]}, r"`features=\['colour'\]`"),
        ({"features": ["digit"]}, "`vocab_size=None`"),
        ({"block_length": 0}, "`block_length=0`"),
        ({"num_layers": 0}, "`num_layers=0`"),
    ):
        with pytest.raises(ValueError, match=message):
            UnmaskingFilterConfig(**wrong)
