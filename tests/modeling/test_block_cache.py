"""Block caches: the published tokens, a slow version that computes every position in every pass, and batches."""

import pytest
import torch
from transformers import Cache

from tests.golden import load_cases
from tests.modeling.test_generation import (
    EOS,
    MASK,
    POLICY_SETTINGS,
    ShiftedConfig,
    ShiftedModel,
    golden,
    padded_batch,
)

LOOPS = {
    "entropy": "entropy_threshold",
    "confidence": "confidence_threshold",
    "factor": "confidence_factor",
    "fixed": "confidence",
    "fixed_entropy_order": "entropy",
}
CASES = [
    pytest.param(name, case, id=f"{name}-{case['id']}")
    for name in ("llada_tiny", "llada_tiny_gqa")
    for case in load_cases(f"generate_{name}")[0]
    if case["family"].split("_")[0] in ("prefix", "dual")
]
CACHES = [
    {"block_cache": "prefix"},
    {"block_cache": "dual"},
    {"block_cache": "dual", "cache_refresh_interval": 3},
    {"block_cache": "prefix", "cache_refresh": "previous_block"},
    {"block_cache": "dual", "cache_refresh": "previous_block"},
]


def name_of(settings):
    return "-".join(map(str, settings.values()))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_published_tokens(models, name, case):
    """The published loops also make passes that write nothing: passes are compared by their order."""
    ids, fill_step = golden(name, case)
    cache, _, rule = case["family"].partition("_")
    number = case["factor"] if rule == "factor" else case["threshold"]
    output = models[name].generate(
        ids[:, : case["prompt_length"]],
        max_new_tokens=case["gen_length"],
        block_length=case["block_length"],
        unmasking=LOOPS[rule],
        block_cache=cache,
        stop_at_eos=False,
        return_dict_in_generate=True,
        **({"steps": case["steps"]} if rule.startswith("fixed") else {"threshold": number}),
    )
    assert torch.equal(output.sequences, ids)
    assert torch.equal(output.unmasking_step[0], torch.unique(fill_step, return_inverse=True)[1])
    assert output.num_forward_passes.item() == len(fill_step.unique())


class SlowCache(Cache):
    """Every pass is over the whole canvas; outside of a span, keys and values are replaced by those of earlier passes,
    so that what happens inside does not know of the new ones."""

    def __init__(self):
        super().__init__(layers=[])
        self.kept, self.span = {}, None

    def update(self, keys, values, layer_idx, *args, **kwargs):
        kept = self.kept.setdefault(layer_idx, (keys.clone(), values.clone()))
        for new, old in zip((keys, values), kept, strict=True):
            old[:, :, self.span] = new[:, :, self.span]
        return kept

    def get_query_offset(self, layer_idx=0):
        return 0

    def get_mask_sizes(self, query_length, layer_idx=0):
        return query_length, 0


def slow_decode(model, prompt, length, block_length, threshold, block_cache, refresh="full", interval=None):
    """Entropy-threshold decoding of one prompt."""
    shift, start, cache = model.logits_shift, len(prompt), SlowCache()
    canvas, nfe = torch.tensor([prompt + [MASK] * length]), 0
    for first in range(start, start + length, block_length):
        last, number = min(first + block_length, start + length), 0
        while (canvas[0, first:last] == MASK).any():
            if (number == 0 and (first == start or refresh == "full")) or (interval and number % interval == 0):
                cache.span = slice(0, None)
            else:
                begin = first - block_length if number == 0 else first
                cache.span = slice(begin - shift, last if block_cache == "dual" else None)
            logits = model(canvas, past_key_values=cache).logits[0].roll(shift, dims=0).log_softmax(dim=-1)
            number, nfe = number + 1, nfe + 1
            entropy = -(logits.exp() * logits).sum(dim=-1)
            entropy[canvas[0] != MASK] = torch.inf
            logits[:, MASK] = -torch.inf
            accepted = entropy[first:last] <= threshold
            accepted[entropy[first:last].argmin()] = True
            canvas[0, first:last] = torch.where(accepted, logits[first:last].argmax(dim=-1), canvas[0, first:last])
    return canvas[0, start:].tolist(), nfe


@torch.no_grad()
@pytest.mark.parametrize("settings", CACHES, ids=name_of)
def test_equals_the_slow_version(model, settings):
    differs = 0
    for seed in range(6):
        prompt = torch.randint(0, 317, (5 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        plain = {"max_new_tokens": 22, "block_length": 6, "unmasking": "entropy_threshold", "threshold": 0.7}
        plain |= {"stop_at_eos": False, "return_dict_in_generate": True}
        output = model.generate(torch.tensor([prompt]), **plain, **settings)
        refresh, interval = settings.get("cache_refresh", "full"), settings.get("cache_refresh_interval")
        expected, nfe = slow_decode(model, prompt, 22, 6, 0.7, settings["block_cache"], refresh, interval)
        assert output.sequences[0, len(prompt) :].tolist() == expected
        assert output.num_forward_passes.item() == nfe
        differs += expected != model.generate(torch.tensor([prompt]), **plain).sequences[0, len(prompt) :].tolist()
    assert differs > 0  # it is an approximation


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("settings", POLICY_SETTINGS, ids=name_of)
def test_a_refresh_in_every_pass_is_exact(family, model, settings, cache):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 317, (length,), generator=generator).tolist() for length in (3, 17, 9)]
    ids, mask = padded_batch(rows)
    settings = settings | {"max_new_tokens": 21, "block_length": 8, "eos_token_id": list(family.frequent)}
    settings |= {"attention_mask": mask, "return_dict_in_generate": True}
    exact = model.generate(ids, **settings)
    cached = model.generate(ids, block_cache=cache, cache_refresh_interval=1, **settings)
    assert torch.equal(exact.sequences, cached.sequences)
    assert torch.equal(exact.unmasking_step, cached.unmasking_step)


@pytest.mark.parametrize("cache", CACHES, ids=name_of)
@pytest.mark.parametrize(
    "settings", [POLICY_SETTINGS[0], POLICY_SETTINGS[2], POLICY_SETTINGS[4], POLICY_SETTINGS[7]], ids=name_of
)
def test_batch_equals_single(family, model, settings, cache):
    """Whatever the neighbours do, although passes are made for them too."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 40, (12,), generator=generator).tolist()
    rows = [torch.randint(0, 317, (length,), generator=generator).tolist() for length in lengths]
    settings = settings | cache | {"max_new_tokens": 20, "block_length": 6, "return_dict_in_generate": True}
    settings |= {"eos_token_id": list(family.frequent), "pad_token_id": EOS}
    ids, mask = padded_batch(rows)
    batch = model.generate(ids, attention_mask=mask, **settings)
    for i, row in enumerate(rows):
        single = model.generate(torch.tensor([row]), **settings)
        assert batch.sequences[i, -20:].tolist() == single.sequences[0, -20:].tolist()
        assert batch.unmasking_step[i].tolist() == single.unmasking_step[0].tolist()


def test_only_what_is_needed_is_computed(model, prompt):
    shapes, shift = [], model.logits_shift
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    settings = {"max_new_tokens": 20, "block_length": 8, "unmasking": "confidence", "steps": 9, "stop_at_eos": False}
    try:
        for cache, expected in (
            ({}, [29] * 9),
            ({"block_cache": "prefix"}, [29, *[20 + shift] * 2, 29, *[12 + shift] * 2, 29, *[4 + shift] * 2]),
            ({"block_cache": "dual"}, [29, *[8 + shift] * 2, 29, *[8 + shift] * 2, 29, *[4 + shift] * 2]),
            (
                {"block_cache": "dual", "cache_refresh": "previous_block"},
                [29, *[8 + shift] * 2, 16 + shift, *[8 + shift] * 2, 12 + shift, *[4 + shift] * 2],
            ),
            (
                {"block_cache": "dual", "cache_refresh_interval": 2},
                [29, 8 + shift, 29, 29, 8 + shift, 29, 29, 4 + shift, 29],
            ),
        ):
            shapes.clear()
            model.generate(prompt, **settings, **cache)
            assert shapes == expected
    finally:
        hook.remove()


def test_a_model_without_a_cache_says_so():
    model = ShiftedModel(ShiftedConfig())
    with pytest.raises(ValueError, match="`block_cache` needs a model that keeps `past_key_values`: ShiftedModel"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, block_cache="dual")


def test_a_cached_policy_is_saved_with_the_checkpoint(family, tmp_path, prompt):
    model = family.load()
    model.generation_config.update(block_cache="dual", cache_refresh="previous_block", max_new_tokens=20)
    model.save_pretrained(tmp_path)
    loaded = family.model.from_pretrained(tmp_path)
    expected = family.load().generate(prompt, max_new_tokens=20, block_cache="dual", cache_refresh="previous_block")
    assert torch.equal(loaded.generate(prompt), expected)
