"""generate(): the published tokens and passes, and the contract with a transformers user."""

import copy
import logging
import socket
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    PreTrainedConfig,
    PreTrainedModel,
    TextDiffusionStreamer,
    set_seed,
)
from transformers.generation import LogitsProcessor, StoppingCriteria, TemperatureLogitsWarper, TopKLogitsWarper
from transformers.modeling_outputs import CausalLMOutputWithPast

from dparallel.modeling import (
    POLICIES,
    DiffusionGenerationConfig,
    DiffusionGenerationMixin,
    UnmaskingFilter,
    UnmaskingFilterConfig,
)
from tests.families import FAMILIES, MOSTLY_SLOW
from tests.golden import load_cases

MASK, EOS = 319, 318
LOOPS = {
    "fixed": "confidence",
    "entropy": "entropy_threshold",
    "confidence": "confidence_threshold",
    "factor": "confidence_factor",
    "semiar_entropy_threshold": "entropy_threshold",
}
MODELS = ("llada_tiny", "llada_tiny_gqa", "dream_tiny")
CASES = [
    pytest.param(name, case, id=f"{name}-{case['id']}")
    for name in MODELS
    for case in load_cases(f"generate_{name}")[0]
    if case["family"] in LOOPS and case["robust_to_3e4_logit_noise"]
]


def golden(name, case):
    _, tensors = load_cases(f"generate_{name}")
    ids, fill_step = tensors[f"{case['id']}.ids"], tensors[f"{case['id']}.fill_step"]
    return ids.view(1, -1), fill_step.view(-1)


def settings_of(case):
    settings = {"unmasking": LOOPS[case["family"]], "block_length": case["block_length"]}
    if case["family"] == "fixed":
        return settings | {"steps": case["steps"]}
    return settings | {"threshold": case["factor"] if case["family"] == "factor" else case["threshold"]}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_published_tokens_and_passes(models, name, case):
    ids, fill_step = golden(name, case)
    output = models[name].generate(
        ids[:, : case["prompt_length"]],
        max_new_tokens=case["gen_length"],
        stop_at_eos=False,
        return_dict_in_generate=True,
        **settings_of(case),
    )
    assert torch.equal(output.sequences, ids)
    assert output.num_forward_passes.tolist() == [case["nfe"]]
    assert torch.equal(output.unmasking_step[0], fill_step)
    assert ((output.unmasking_confidence > 0) & (output.unmasking_confidence <= 1)).all()


def end_of_text(answer, fill_step, eos):
    """What the golden trajectory implies: the pass after which an end-of-text stands with everything before it
    written, and the length of the answer."""
    for nfe in range(1, int(fill_step.max()) + 2):
        written = fill_step < nfe
        prefix = int(written.int().cumprod(dim=0).sum())
        hits = [i for i in range(prefix) if int(answer[i]) in eos]
        if hits:
            return nfe, hits[0] + 1
    return int(fill_step.max()) + 1, len(answer)


@pytest.mark.parametrize(("name", "case"), CASES[::6])
def test_stop_at_eos_is_what_the_fill_steps_imply(models, name, case):
    """Any token of the golden answer may play the end-of-text: inside a block, at its end, at the last position."""
    ids, fill_step = golden(name, case)
    length, prompt_length = case["gen_length"], case["prompt_length"]
    answer = ids[0, prompt_length:]
    unused = next(token for token in range(317) if token not in answer.tolist())
    choices = [[answer[i].item()] for i in (0, 7, case["block_length"] - 1, length - 1)]
    choices += [[unused], [answer[40].item(), answer[20].item()], [unused, answer[33].item()]]
    for eos in choices:
        for pad in (EOS, eos[0]):
            output = models[name].generate(
                ids[:, :prompt_length],
                max_new_tokens=length,
                eos_token_id=eos if len(eos) > 1 else eos[0],
                pad_token_id=pad,
                return_dict_in_generate=True,
                **settings_of(case),
            )
            nfe, end = end_of_text(answer, fill_step, eos)
            assert output.num_forward_passes.tolist() == [nfe]
            assert output.sequences[0, prompt_length : prompt_length + end].tolist() == answer[:end].tolist()
            assert (output.sequences[0, prompt_length + end :] == pad).all()
            assert output.tokens_per_forward.item() == pytest.approx(end / nfe)
            expected = torch.where(fill_step < nfe, fill_step, -1)
            assert torch.equal(output.unmasking_step[0], expected)


def padded_batch(rows):
    width = max(len(row) for row in rows)
    ids = torch.tensor([[EOS] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


POLICY_SETTINGS = [
    {"unmasking": "confidence_threshold", "threshold": 0.5},
    {"unmasking": "confidence_factor", "threshold": 1.0},
    {"unmasking": "entropy_threshold", "threshold": 0.8},
    {"unmasking": "entropy_bound", "threshold": 0.8},
    {"unmasking": "confidence", "steps": 9},
    {"unmasking": "entropy", "steps": 9, "schedule": "linear_time"},
    {"unmasking": "margin", "steps": 9},
    {"unmasking": "confidence_threshold", "threshold": 0.5, "eos_threshold": 0.1},
    {"unmasking": "confidence_threshold", "threshold": 0.5, "repetition_penalty": 1.8, "min_new_tokens": 5},
]


@pytest.mark.parametrize("settings", POLICY_SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_batch_equals_single(family, model, settings):
    """20 prompts of mixed lengths: each row has the tokens and passes it has alone, whatever its neighbours do."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 40, (20,), generator=generator).tolist()
    rows = [torch.randint(0, 317, (length,), generator=generator).tolist() for length in lengths]
    # Two frequent tokens of these answers stand for end-of-text, so that rows end at different times.
    settings = settings | {"max_new_tokens": 20, "block_length": 8, "eos_token_id": list(family.frequent)}
    singles = [model.generate(torch.tensor([row]), return_dict_in_generate=True, **settings) for row in rows]
    ends = set()
    for first in range(0, 20, 10):
        ids, mask = padded_batch(rows[first : first + 10])
        batch = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
        for i, single in enumerate(singles[first : first + 10]):
            assert batch.sequences[i, ids.shape[1] :].tolist() == single.sequences[0, -20:].tolist()
            assert batch.num_forward_passes[i] == single.num_forward_passes[0]
            assert batch.unmasking_step[i].tolist() == single.unmasking_step[0].tolist()
            torch.testing.assert_close(
                batch.unmasking_confidence[i], single.unmasking_confidence[0], atol=1e-4, rtol=0
            )
            torch.testing.assert_close(batch.tokens_per_forward[i], single.tokens_per_forward[0])
            ends.add(single.num_forward_passes.item())
    assert len(ends) > 1


class ShiftedConfig(PreTrainedConfig):
    model_type = "shifted"
    vocab_size: int = 40
    hidden_size: int = 16
    num_hidden_layers: int = 1
    mask_token_id: int = 39
    eos_token_id: int = 38
    pad_token_id: int = 38


class ShiftedModel(PreTrainedModel, DiffusionGenerationMixin):
    """A made-up family that meets the interface and nothing more: its logits at position i - 1 predict token i. Each
    position sees the mean of what its mask shows, and itself."""

    config_class = ShiftedConfig
    logits_shift = 1

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.place = nn.Embedding(200, config.hidden_size)
        self.head = nn.Linear(2 * config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids) * (1 + self.place(position_ids))
        weights = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (x * weights[..., None]).sum(dim=1, keepdim=True) / weights.sum(dim=1)[:, None, None]
        x = torch.cat((x, mean.expand_as(x)), dim=-1)
        if isinstance(logits_to_keep, int):
            x = x[:, -logits_to_keep:]
        else:
            x = x[:, logits_to_keep] if logits_to_keep.ndim == 1 else x.take_along_dim(logits_to_keep[..., None], 1)
        return CausalLMOutputWithPast(logits=self.head(x))


@pytest.fixture(scope="module")
def shifted():
    torch.manual_seed(0)
    model = ShiftedModel(ShiftedConfig())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def slow_decode(model, prompt, length, block_length, threshold):
    """Entropy-threshold decoding of one prompt, position by position, with logits of the whole canvas."""
    mask, shift = model.config.mask_token_id, model.logits_shift
    canvas, nfe, start = prompt + [mask] * length, 0, len(prompt)
    for first in range(start, start + length, block_length):
        block = range(first, min(first + block_length, start + length))
        while any(canvas[i] == mask for i in block):
            logits = model(torch.tensor([canvas])).logits[0].double()
            nfe += 1
            found = {}
            for i in (i for i in block if canvas[i] == mask):
                probs = logits[i - shift].softmax(dim=0)
                entropy = -(probs * (probs + 1e-30).log()).sum().item()
                probs[mask] = -1
                found[i] = (entropy, probs.argmax().item())
            best = min(found, key=lambda i: found[i][0])
            for i, (entropy, token) in found.items():
                if i == best or entropy <= threshold:
                    canvas[i] = token
    return canvas[start:], nfe


@pytest.mark.parametrize("name", ["llada", "dream", "shifted"])
def test_any_family_equals_the_slow_loop(name, models, shifted):
    model = shifted if name == "shifted" else models[f"{name}_tiny"]
    high = model.config.mask_token_id - 2
    for seed in range(5):
        prompt = torch.randint(0, high, (seed + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected, nfe = slow_decode(model, prompt, length=13, block_length=5, threshold=1.0)
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=13,
            block_length=5,
            unmasking="entropy_threshold",
            threshold=1.0,
            stop_at_eos=False,
            return_dict_in_generate=True,
        )
        assert output.sequences[0, len(prompt) :].tolist() == expected
        assert output.num_forward_passes.item() == nfe


def test_shifted_family_in_a_padded_batch(shifted):
    rows = [[5], [7, 8, 9], [1, 2, 3, 4, 5, 6]]
    width = 6
    ids = torch.tensor([[38] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    batch = shifted.generate(ids, attention_mask=mask, max_new_tokens=11, block_length=4, stop_at_eos=False)
    for i, row in enumerate(rows):
        single = shifted.generate(torch.tensor([row]), max_new_tokens=11, block_length=4, stop_at_eos=False)
        assert batch[i, width:].tolist() == single[0, len(row) :].tolist()


def test_only_the_block_goes_through_the_head(model, prompt):
    shapes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    try:
        model.generate(prompt, max_new_tokens=20, block_length=8, unmasking="confidence", steps=5, stop_at_eos=False)
    finally:
        hook.remove()
    assert shapes == [(1, 8, 320)] * 4 + [(1, 4, 320)]  # 5 steps over 3 blocks: 2, 2, 1


@pytest.mark.parametrize(
    "cache", [{}, {"block_cache": "dual", "cache_refresh": "previous_block"}], ids=["none", "dual"]
)
def test_ended_rows_leave_the_batch(model, prompt, cache):
    """In the next pass, and what is returned is in the order of the prompts; with a user's criteria all rows stay."""
    ids = torch.cat([prompt.roll(i, 1) for i in range(6)])
    settings = {"max_new_tokens": 24, "block_length": 8, "unmasking": "confidence", "steps": 24, **cache}
    full = model.generate(ids, stop_at_eos=False, **settings)[:, 9:]
    # The token that ends some rows in the first block, and not all.
    ending = next(t for t in full[:, :8].unique().tolist() if 2 <= (full[:, :8] == t).any(dim=1).sum() <= 4)
    ends = (full[:, :8] == ending).any(dim=1)
    shapes, settings = [], settings | {"eos_token_id": ending, "pad_token_id": EOS, "return_dict_in_generate": True}

    def note(module, args, kwargs):
        cache = kwargs.get("past_key_values")  # with one, the rows' tokens stand one behind the other
        shapes.append(len(kwargs["input_ids"] if cache is None else cache.tokens.offset))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        output = model.generate(ids, **settings)
        taken = [(output.num_forward_passes > number).sum().item() for number in range(24)]
        assert shapes == [count for count in taken if count] and output.sequences.shape == (6, 33)
        shapes.clear()
        stayed = model.generate(ids, stopping_criteria=[StopAt([500] * 6)], **settings)
        assert set(shapes) == {6}
    finally:
        hook.remove()
    for name in ("sequences", "num_forward_passes", "unmasking_step", "tokens_per_forward"):
        assert torch.equal(output[name], stayed[name])
    assert torch.equal((output.sequences[:, 9:] == ending).any(dim=1) & (output.num_forward_passes <= 8), ends)


def test_one_look_at_the_device_per_pass(model, prompt, monkeypatch):
    """The loop reads from the device once a pass. On a CPU that is a `cpu`, `tolist`, `item` or `bool` of a tensor."""
    reads, passes = [], []
    hook = model.register_forward_hook(lambda *args: passes.append(len(reads)))
    for name in ("cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, original=original):
            reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    try:
        model.generate(prompt, max_new_tokens=24, block_length=12, unmasking="confidence", steps=12)
    finally:
        hook.remove()
    between = [b - a for a, b in pairwise(passes)]
    assert len(between) == 11 and set(between) == {1}


def test_model_whose_best_token_is_mask_terminates(family, prompt):
    model = family.load()
    head = model.get_output_embeddings()
    head.weight.data[MASK] = 0
    head.weight.data *= 0.01
    model.get_submodule(family.norm).register_forward_hook(lambda module, args, out: out + 1)
    head.weight.data[MASK] = 1  # a logit of about 64 where the others are near 0
    model.set_unmasking_filter(UnmaskingFilter(UnmaskingFilterConfig(block_length=4)))
    for unmasking in POLICIES:
        output = model.generate(
            prompt, max_new_tokens=10, block_length=4, unmasking=unmasking, return_dict_in_generate=True
        )
        assert (output.sequences != MASK).all()
        assert 1 <= output.num_forward_passes.item() <= 10


# --- early end-of-text ----------------------------------------------------------------------------------------------


def slow_predicted_end(model, prompt, length, block_length, threshold, eos, eos_threshold):
    """Confidence-threshold decoding with End-of-Text Prediction, the canvas really cut off behind the end."""
    mask, start = model.config.mask_token_id, len(prompt)
    canvas, nfe = prompt + [mask] * length, 0
    for first in range(start, start + length, block_length):
        while any(token == mask for token in canvas[first : first + block_length]):
            block = range(first, min(first + block_length, len(canvas)))
            probs = model(torch.tensor([canvas])).logits[0].softmax(dim=-1)
            probs = probs.roll(model.logits_shift, dims=0)  # row i predicts token i
            nfe += 1
            probs[:, mask] = -1
            best = {i: probs[i].max(dim=0) for i in block if canvas[i] == mask}
            top = max(best, key=lambda i: best[i].values)
            accepted = {i for i in best if best[i].values >= threshold} | {top}
            ends = [i for i in best if best[i].indices in eos and (i in accepted or best[i].values >= eos_threshold)]
            for i in accepted | set(ends[:1]):
                canvas[i] = best[i].indices.item()
            if ends:
                canvas = canvas[: ends[0] + 1]
        if canvas[-1] in eos and len(canvas) <= first + block_length:
            break
    return canvas[start:], nfe


def test_predicted_end_equals_the_slow_version(family, model):
    generator = torch.Generator().manual_seed(5)
    eos, lengths = list(family.frequent), []
    for _ in range(12):
        prompt = torch.randint(0, 317, (9,), generator=generator)
        expected, nfe = slow_predicted_end(model, prompt.tolist(), 24, 8, 0.6, eos, 0.2)
        output = model.generate(
            prompt[None],
            max_new_tokens=24,
            block_length=8,
            threshold=0.6,
            eos_token_id=eos,
            pad_token_id=EOS,
            eos_threshold=0.2,
            return_dict_in_generate=True,
        )
        assert output.sequences[0, 9:].tolist() == expected + [EOS] * (24 - len(expected))
        assert output.num_forward_passes.item() == nfe
        lengths.append(len(expected))
    assert min(lengths) < 24 and len(set(lengths)) > 2


# --- what a transformers user expects --------------------------------------------------------------------------------


def test_tensor_or_output(model, prompt):
    ids = model.generate(prompt, max_new_tokens=8)
    output = model.generate(prompt, max_new_tokens=8, return_dict_in_generate=True)
    assert torch.equal(ids, output.sequences) and torch.equal(ids[:, :9], prompt)
    assert torch.equal(model.generate(input_ids=prompt, max_length=17), ids)
    assert list(output) == [
        "sequences", "num_forward_passes", "tokens_per_forward", "unmasking_step", "unmasking_confidence",
    ]  # fmt: skip


def test_sampling_is_seeded_and_warped(model, prompt):
    settings = {"max_new_tokens": 24, "do_sample": True, "stop_at_eos": False, "unmasking": "random"}
    set_seed(1)
    first = model.generate(prompt, **settings)
    set_seed(1)
    assert torch.equal(model.generate(prompt, **settings), first)
    set_seed(2)
    assert not torch.equal(model.generate(prompt, **settings), first)
    by_generator = [model.generate(prompt, generator=torch.Generator().manual_seed(7), **settings) for _ in range(2)]
    assert torch.equal(*by_generator)
    greedy = {"max_new_tokens": 24, "stop_at_eos": False, "unmasking": "confidence"}
    for warp in ({"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}):
        sampled = model.generate(prompt, do_sample=True, **greedy, **warp)
        assert torch.equal(sampled, model.generate(prompt, **greedy))


def test_greedy_decoding_leaves_the_global_generator_alone(model, prompt):
    before = torch.random.get_rng_state()
    model.generate(prompt, max_new_tokens=8)
    model.generate_batch(prompt.tolist(), max_new_tokens=8)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_num_return_sequences(model, prompt):
    ids, mask = padded_batch([prompt[0].tolist(), [1, 2]])
    output = model.generate(
        ids, attention_mask=mask, num_return_sequences=3, do_sample=True, max_new_tokens=8, stop_at_eos=False
    )
    assert output.shape == (6, 17)
    assert torch.equal(output[:, :9], ids.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in output[:3, 9:].tolist()}) == 3
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.generate(prompt, num_return_sequences=3)


def test_logits_processors_see_what_autoregressive_ones_see(model, prompt):
    calls = []

    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append((tuple(input_ids.shape), tuple(scores.shape)))
            scores = scores.clone()
            scores[:, banned] = -torch.inf
            return scores

    settings = {"max_new_tokens": 12, "block_length": 4, "unmasking": "confidence", "steps": 3, "stop_at_eos": False}
    plain = model.generate(prompt, **settings)
    banned = plain[0, 9:].unique()
    output = model.generate(prompt, logits_processor=[Ban()], **settings)
    assert not torch.isin(output[:, 9:], banned).any()
    assert calls == [((1, 9 + i), (1, 320)) for i in range(12)]
    calls.clear()
    bad_words = [[token] for token in banned.tolist()]
    assert torch.equal(model.generate(prompt, bad_words_ids=bad_words, **settings), output)
    assert torch.equal(model.generate(prompt, suppress_tokens=banned.tolist(), **settings), output)


def test_processors_may_count_tokens_behind_padding(family):
    """Of rows that are padded, or nothing but padding, they see what they see of one alone, and [MASK]."""

    class Frequencies(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores - 2.0 * nn.functional.one_hot(input_ids, 320).sum(dim=1)

    model, longest = family.load(), torch.arange(20, 29)
    settings = {"max_new_tokens": 12, "stop_at_eos": False, "repetition_penalty": 3.0}
    for length in (1, 3, 9) if family.name == "dream" else (0, 1, 3, 9):
        row = torch.arange(length)
        rows = torch.stack((torch.cat((torch.full((9 - length,), EOS), row)), longest))
        mask = torch.stack((torch.arange(9) >= 9 - length, torch.ones(9))).long()
        settings["block_length"] = 4 if length else 1  # without a prompt, all positions are alike
        for extra in ({}, {"logits_processor": [Frequencies()]}):
            alone = model.generate(row[None], **settings, **extra)
            batch = model.generate(rows, attention_mask=mask, **settings, **extra)
            assert torch.equal(batch[0, 9:], alone[0, length:])


def test_double_precision(family, prompt):
    model = family.load().double()
    rows = torch.cat((prompt, torch.cat((torch.full((1, 4), EOS), prompt[:, :5]), dim=1)))
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    batch = model.generate(rows, attention_mask=mask, max_new_tokens=12, eos_threshold=0.9)
    assert torch.equal(batch[1, 9:], model.generate(prompt[:, :5], max_new_tokens=12, eos_threshold=0.9)[0, 5:])


def test_numbers_go_with_what_they_were_given_for(family, prompt):
    """A checkpoint's do not stand in the way of what a call asks for."""
    model = family.load()
    model.generation_config.update(unmasking="entropy_threshold", threshold=0.7, eos_threshold=0.9)
    model.generation_config.update(block_cache="dual", cache_refresh_interval=2)
    asked = DiffusionGenerationConfig(threshold=2.0, max_new_tokens=8)  # nats: of the checkpoint's policy
    assert torch.equal(model.generate(prompt, asked), model.generate(prompt, threshold=2.0, max_new_tokens=8))
    model.generate(prompt, stop_at_eos=False, max_new_tokens=8)
    model.generate(prompt, cache_refresh="previous_block", mask_token_id=None, max_new_tokens=8)
    model.generation_config.update(unmasking="confidence_threshold", threshold=0.9)
    with pytest.raises(
        ValueError, match=r"`threshold=2\.0` is not allowed: it must be a number at least 0 and at most 1"
    ):
        model.generate(prompt, asked)
    for wrong in (-1.0, "a"):
        with pytest.raises(ValueError, match=r"`threshold=.* is not allowed: it must be a number of at least 0"):
            DiffusionGenerationConfig(threshold=wrong)


def test_processors_of_single_positions_take_all_at_once(model, prompt):
    """With the result of one column after the other, also in bfloat16."""

    class Column(TemperatureLogitsWarper):
        """Of another type, it is called for each column."""

    settings = {"max_new_tokens": 12, "block_length": 6, "unmasking": "entropy_threshold", "threshold": 1.0}
    settings["return_dict_in_generate"] = True
    for decoder in (model, copy.deepcopy(model).bfloat16()):
        together, apart = (
            decoder.generate(prompt, logits_processor=[warper(0.7), TopKLogitsWarper(50)], **settings)
            for warper in (TemperatureLogitsWarper, Column)
        )
        assert torch.equal(together.sequences, apart.sequences)
        torch.testing.assert_close(together.unmasking_confidence, apart.unmasking_confidence)


def test_none_means_the_default(model, prompt):
    settings = {"max_new_tokens": 8, "unmasking": "entropy", "schedule": "linear_time", "steps": 4}
    expected = model.generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, eps=None, block_length=None, stop_at_eos=None, **settings), expected)


def test_min_new_tokens_holds_off_the_end(model, prompt):
    settings = {"max_new_tokens": 12, "block_length": 4, "unmasking": "confidence"}
    eos = model.generate(prompt, stop_at_eos=False, **settings)[0, 9].item()
    output = model.generate(prompt, eos_token_id=eos, pad_token_id=EOS, min_new_tokens=6, **settings)
    assert eos not in output[0, 9:15].tolist()


class StopAt(StoppingCriteria):
    """Stops rows at given lengths, and notes what it was shown."""

    def __init__(self, lengths):
        self.lengths, self.shown = torch.tensor(lengths), []

    def __call__(self, input_ids, scores, **kwargs):
        self.shown.append(input_ids.clone())
        return input_ids.shape[1] == self.lengths


def test_stopping_criteria_cut_each_row_where_it_says(model, prompt):
    ids = torch.cat((prompt, prompt.flip(1), prompt.roll(3, 1)))
    settings = {"max_new_tokens": 24, "block_length": 8, "unmasking": "confidence", "return_dict_in_generate": True}
    full = model.generate(ids, stop_at_eos=False, **settings)
    criterion = StopAt([9 + 3, 9 + 12, 500])
    output = model.generate(ids, stopping_criteria=[criterion], stop_at_eos=False, **settings)
    for row, end in enumerate((3, 12, 24)):
        assert output.sequences[row, : 9 + end].tolist() == full.sequences[row, : 9 + end].tolist()
        assert (output.sequences[row, 9 + end :] == EOS).all()
    assert output.num_forward_passes.tolist() == [8, 16, 24]
    assert [shown.shape[1] for shown in criterion.shown] == list(range(10, 34))
    assert all((shown[2] != MASK).all() for shown in criterion.shown)


def test_neutral_values_of_refused_arguments_are_accepted(model, prompt):
    expected = model.generate(prompt, max_new_tokens=8)
    neutral = {"output_attentions": False, "guidance_scale": 1.0, "num_beams": 1, "min_length": 0, "use_cache": True}
    assert torch.equal(model.generate(prompt, max_new_tokens=8, **neutral), expected)
    config = GenerationConfig.from_model_config(model.config)
    assert torch.equal(model.generate(prompt, config, max_new_tokens=8), expected)


def test_max_time_and_criteria_both_cut(model, prompt):
    class Late(MaxTimeCriteria):
        """A clock that strikes in its fifth pass."""

        def __init__(self):
            super().__init__(max_time=0.0)
            self.passes = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.passes += 1
            return torch.tensor([self.passes >= 5])

    settings = {"max_new_tokens": 24, "block_length": 1, "unmasking": "confidence", "stop_at_eos": False}
    full = model.generate(prompt, **settings)[0, 9:].tolist()
    for stop, length in ((100, 5), (9 + 3, 3)):
        criteria = [Late(), StopAt([stop])]
        output = model.generate(prompt, stopping_criteria=criteria, **settings)[0, 9:].tolist()
        assert output == full[:length] + [EOS] * (24 - length)


def test_max_time_ends_after_a_pass(model, prompt):
    output = model.generate(
        prompt,
        max_time=0.0,
        max_new_tokens=24,
        unmasking="confidence",
        stop_at_eos=False,
        return_dict_in_generate=True,
    )
    assert output.num_forward_passes.item() == 1
    assert (output.sequences != MASK).all() and (output.unmasking_step >= 0).sum() == 1


class Recorder(TextDiffusionStreamer):
    def __init__(self):
        super().__init__(tokenizer=None)
        self.prompt, self.text, self.drafts, self.ended = None, [], [], False

    def put(self, value):
        if self.prompt is None:
            self.prompt = value
        else:
            self.text.append(value.tolist())

    def put_draft(self, value, **kwargs):
        self.drafts.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("criteria", [None, [StopAt([9 + 13])]])
def test_streamer_sees_the_text_grow(model, prompt, criteria):
    streamer = Recorder()
    settings = {"max_new_tokens": 24, "block_length": 8, "unmasking": "confidence"}
    eos = model.generate(prompt, stop_at_eos=False, **settings)[0, 9 + 18].item()
    output = model.generate(prompt, streamer=streamer, stopping_criteria=criteria, eos_token_id=eos, **settings)
    assert torch.equal(streamer.prompt, prompt) and streamer.ended
    text = [token for tokens in streamer.text for token in tokens]
    assert text == output[0, 9 : 9 + len(text)].tolist()
    assert MASK not in text
    first_eos = output[0, 9:].tolist().index(eos) + 1 if eos in output[0, 9:].tolist() else 24
    assert len(text) == (min(13, first_eos) if criteria else first_eos)
    assert len(streamer.text) > 1
    assert all(len(draft) <= 8 and MASK in draft for draft in streamer.drafts) and len(streamer.drafts) > 5


def test_streamer_needs_a_single_row(model, prompt):
    with pytest.raises(ValueError, match="`streamer` needs a batch of 1"):
        model.generate(prompt.repeat(2, 1), streamer=Recorder())


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(model, monkeypatch):
    """A checkpoint that ships a policy with its threshold."""
    config = DiffusionGenerationConfig(
        unmasking="entropy_threshold", threshold=9.0, max_new_tokens=12, block_length=6, eos_token_id=EOS
    )
    monkeypatch.setattr(model, "generation_config", config)
    return model


def prepared(model, *args, **kwargs):
    return model._prepare_generation_config(*args, **kwargs)[0]


def test_precedence_of_settings(shipped):
    assert (prepared(shipped).unmasking, prepared(shipped).threshold) == ("entropy_threshold", 9.0)
    assert prepared(shipped, threshold=0.3).threshold == 0.3
    # Another policy does not inherit the number, in whichever way it is named.
    for config in (
        prepared(shipped, unmasking="confidence_threshold"),
        prepared(shipped, DiffusionGenerationConfig(unmasking="confidence_threshold")),
        prepared(shipped, shipped.generation_config, unmasking="confidence_threshold"),
    ):
        assert (config.unmasking, config.threshold, config.block_length) == ("confidence_threshold", None, 6)
    assert prepared(shipped, unmasking="entropy_threshold").threshold == 9.0
    assert prepared(shipped, DiffusionGenerationConfig(threshold=0.4)).threshold == 0.4
    assert prepared(shipped, GenerationConfig(max_new_tokens=3)).block_length == 6
    assert prepared(shipped, max_length=40).max_new_tokens is None
    assert (prepared(shipped).schedule, prepared(shipped).stop_at_eos, prepared(shipped).mask_token_id) == (
        "even",
        True,
        MASK,
    )


def test_defaults_of_a_policy_are_used(shipped, prompt):
    by_name = shipped.generate(prompt, unmasking="confidence_threshold", return_dict_in_generate=True)
    explicit = shipped.generate(prompt, unmasking="confidence_threshold", threshold=0.9, return_dict_in_generate=True)
    assert torch.equal(by_name.unmasking_step, explicit.unmasking_step)
    shipped_way = shipped.generate(prompt, return_dict_in_generate=True)
    assert shipped_way.num_forward_passes < by_name.num_forward_passes


def test_generation_config_round_trip(shipped, tmp_path):
    shipped.generation_config.save_pretrained(tmp_path)
    text = (tmp_path / "generation_config.json").read_text()
    assert '"threshold": 9.0' in text and "null" not in text
    assert DiffusionGenerationConfig.from_pretrained(tmp_path).to_dict() == shipped.generation_config.to_dict()
    # transformers marks files with a flag that makes a plain GenerationConfig forget our fields.
    (tmp_path / "generation_config.json").write_text(text.replace("{", '{"_from_model_config": true,', 1))
    shipped.save_pretrained(tmp_path / "model")
    (tmp_path / "generation_config.json").rename(tmp_path / "model" / "generation_config.json")
    loaded = type(shipped).from_pretrained(tmp_path / "model")
    assert isinstance(loaded.generation_config, DiffusionGenerationConfig)
    assert (loaded.generation_config.unmasking, loaded.generation_config.threshold) == ("entropy_threshold", 9.0)


def test_ignored_numbers_are_mentioned(model, prompt, caplog, monkeypatch):
    for settings, name in (
        ({"unmasking": "confidence_threshold", "steps": 4}, "steps"),
        ({"unmasking": "confidence", "threshold": 0.5}, "threshold"),
        ({"unmasking": "confidence_threshold", "unmasking_temperature": 0.5}, "unmasking_temperature"),
        ({"unmasking": "confidence", "threshold": 0}, "threshold"),
        ({"cache_refresh_interval": 2}, "cache_refresh_interval"),
        ({"cache_refresh": "previous_block"}, "cache_refresh"),
        ({"use_cache": True}, "use_cache"),
        ({"unmasking": "confidence_threshold", "schedule": "linear_time"}, "schedule"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model.generate(prompt, max_new_tokens=4, **settings)
        assert sum(f"`{name}` is ignored" in record.getMessage() for record in caplog.records) == 1
    caplog.clear()
    model.generate_batch([[5]], max_new_tokens=4, unmasking="confidence_threshold", steps=4)
    assert "`steps` is ignored" in caplog.text
    caplog.clear()
    monkeypatch.setattr(model.generation_config, "steps", 4)  # of the checkpoint: nobody asked for it
    model.generate(prompt, max_new_tokens=4, unmasking="confidence_threshold")
    assert "is ignored" not in caplog.text


# --- edges -----------------------------------------------------------------------------------------------------------


def test_edges(model, prompt):
    empty = model.generate(torch.empty(0, 5, dtype=torch.long), max_new_tokens=8, return_dict_in_generate=True)
    assert empty.sequences.shape == (0, 13) and empty.num_forward_passes.shape == (0,)
    assert model.generate(torch.tensor([[5]]), max_new_tokens=1).shape == (1, 2)
    # The longest prompt leaves room for one token.
    longest = torch.randint(0, 317, (1, 511), generator=torch.Generator().manual_seed(0))
    assert model.generate(longest).shape == (1, 512)
    with pytest.raises(ValueError, match="at most `config\\.max_position_embeddings=512`"):
        model.generate(longest, max_new_tokens=2)


def test_no_prompt(models, prompt):
    model = models["llada_tiny"]
    # Where there is nothing but [MASK], all positions are alike and rounding would choose: take all in one pass.
    one_pass = {"max_new_tokens": 8, "threshold": 0.0}
    no_prompt = model.generate(torch.empty(1, 0, dtype=torch.long), **one_pass)
    assert no_prompt.shape == (1, 8)
    # A row of padding alone is an empty prompt.
    ids = torch.cat((torch.full((1, 9), EOS), prompt))
    mask = torch.tensor([[0] * 9, [1] * 9])
    output = model.generate(ids, attention_mask=mask, **one_pass)
    assert output[0, 9:].tolist() == no_prompt[0].tolist()
    assert output[1].tolist() == model.generate(prompt, **one_pass)[0].tolist()


@pytest.mark.parametrize("name", ["dream", "shifted"])
def test_shifted_families_need_a_token_to_predict_from(name, models, shifted):
    model = shifted if name == "shifted" else models[f"{name}_tiny"]
    with pytest.raises(ValueError, match="row without a token"):
        model.generate(torch.empty(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="row without a token"):
        model.generate(torch.tensor([[38], [5]]), attention_mask=torch.tensor([[0], [1]]))


def test_mask_of_ones_changes_nothing(model, prompt):
    plain = model.generate(prompt, max_new_tokens=8)
    for dtype in (torch.long, torch.bool, torch.float32):
        assert torch.equal(
            model.generate(prompt, attention_mask=torch.ones(1, 9, dtype=dtype), max_new_tokens=8), plain
        )


BAD = {
    "block_length": (0, -4, 2.5, True, "32"),
    "unmasking": ("greedy", "learned_filter", 3),
    "threshold": (-0.1, 1.5, "high", float("nan")),
    "steps": (0, 1.5),
    "eps": (0.0, 1.0, -0.1, "x"),
    "unmasking_temperature": (-0.5, "hot"),
    "schedule": ("cosine",),
    "block_cache": ("static", "yes"),
    "cache_refresh": ("half",),
    "cache_refresh_interval": (0, 1.5),
    "stop_at_eos": ("yes",),
    "eos_threshold": (-0.5, 1.5),
    "mask_token_id": (-1, 320, "x"),
    "max_new_tokens": (0, -3, 1.5),
    "max_length": (9, 3),
    "temperature": (-1.0, "hot"),
    "top_p": (1.5, -0.1),
    "top_k": (-1, 0.5),
    "max_time": (-1.0,),
    "eos_token_id": (320, MASK, [1, 400], "eos"),
    "pad_token_id": (400, MASK),
    "num_beams": (4,),
    "output_scores": (True,),
    "output_logits": (True,),
    "output_attentions": (True,),
    "penalty_alpha": (0.5,),
    "guidance_scale": (3.0,),
    "prompt_lookup_num_tokens": (3,),
    "cache_implementation": ("static",),
    "assistant_model": ("model",),
    "inputs_embeds": (torch.zeros(1, 9, 64),),
    "position_ids": (torch.zeros(1, 9, dtype=torch.long),),
    "past_key_values": ((),),
    "prefix_allowed_tokens_fn": (len,),
    "no_repeat_ngram_size": (2,),
    "min_length": (20,),
    "bad_words_ids": ([[5, 6]],),
    "sequence_bias": ({(5, 6): -1.0}, [[[5, 6], -1.0]]),
    "num_return_sequences": (0,),
    "generator": (5,),
    "tempereture": (0.5,),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str
)
def test_bad_arguments_are_named_before_any_computation(model, prompt, name, value, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("computed"))
    with pytest.raises((ValueError, TypeError), match=name):
        model.generate(prompt, **{name: value})


def bad_inputs():
    ids = torch.arange(6).view(2, 3)
    return {
        "no inputs": ({"bos_token_id": None}, "Exactly one of"),
        "both": ({"inputs": ids, "input_ids": ids}, "Exactly one of"),
        "list": ({"inputs": [[1, 2]]}, "integer tensor of shape"),
        "one dimension": ({"inputs": ids[0]}, "integer tensor of shape"),
        "floats": ({"inputs": ids.float()}, "integer tensor of shape"),
        "too high": ({"inputs": ids + 318}, "from 0 to 319"),
        "negative": ({"inputs": ids - 1}, "from 0 to 319"),
        "mask in the prompt": ({"inputs": torch.tensor([[1, MASK]])}, r"must not contain \[MASK\]"),
        "mask of another shape": (
            {"inputs": ids, "attention_mask": torch.ones(2, 4)},
            r"shape of `input_ids`, \(2, 3\)",
        ),
        "mask of 4 dimensions": ({"inputs": ids, "attention_mask": torch.ones(2, 1, 3, 3)}, "shape of `input_ids`"),
        "mask as a list": ({"inputs": ids, "attention_mask": [[1]]}, "shape of `input_ids`"),
        "mask of other values": ({"inputs": ids, "attention_mask": 2 * torch.ones(2, 3)}, "other values than 0"),
        "right padding": ({"inputs": ids, "attention_mask": torch.tensor([[1, 1, 0]] * 2)}, "padded on the left"),
        "hole": ({"inputs": ids, "attention_mask": torch.tensor([[1, 0, 1]] * 2)}, "padded on the left"),
        "sampling at 0": ({"inputs": ids, "do_sample": True, "temperature": 0.0}, "temperature"),
        "end without stop": ({"inputs": ids, "eos_threshold": 0.5, "stop_at_eos": False}, "needs `stop_at_eos=True`"),
        "end without eos": ({"inputs": ids, "eos_threshold": 0.5, "eos_token_id": None}, "eos_threshold"),
        "entropy below 0": ({"inputs": ids, "unmasking": "entropy_threshold", "threshold": -1}, "threshold"),
        "factor of 0": ({"inputs": ids, "unmasking": "confidence_factor", "threshold": 0}, "above 0"),
        "two refreshes": (
            {"inputs": ids, "cache_refresh": "previous_block", "cache_refresh_interval": 2},
            "cache_refresh_interval=2` refreshes the whole canvas",
        ),
        "end without any eos": ({"inputs": ids, "eos_threshold": 0.5, "eos_token_id": []}, "eos_threshold"),
        "configuration as a dict": ({"inputs": ids, "generation_config": {"steps": 2}}, "`generation_config="),
        "one processor": ({"inputs": ids, "logits_processor": print}, "`logits_processor=.* a list of callables"),
        "one criterion": ({"inputs": ids, "stopping_criteria": print}, "`stopping_criteria=.* a list of callables"),
        "streamer": ({"inputs": ids, "streamer": "x"}, "`streamer='x'` is not allowed"),
        "suppressed": (
            {"inputs": ids, "suppress_tokens": [320]},
            "`suppress_tokens=.* ids of the vocabulary, 0 to 319",
        ),
        "suppressed alone": ({"inputs": ids, "begin_suppress_tokens": ["a"]}, "`begin_suppress_tokens="),
        "forced eos": ({"inputs": ids, "forced_eos_token_id": 900}, "`forced_eos_token_id=900`"),
        "forced bos": ({"inputs": ids, "forced_bos_token_id": 9}, "`forced_bos_token_id=9` is for autoregressive"),
        "no penalty": ({"inputs": ids, "repetition_penalty": 0}, "`repetition_penalty=0` .* a finite number above 0"),
        "endless heat": ({"inputs": ids, "do_sample": True, "temperature": float("inf")}, "`temperature=inf`"),
        "cutoff": ({"inputs": ids, "do_sample": True, "epsilon_cutoff": 2.0}, r"`epsilon_cutoff=2\.0`"),
        "length below 0": ({"inputs": ids, "min_new_tokens": -5}, "`min_new_tokens=-5` .* an integer of at least 0"),
        "sampling as a word": ({"inputs": ids, "do_sample": "x"}, "`do_sample='x'` .* one of True, False"),
        "no padding": ({"inputs": ids, "eos_token_id": None, "pad_token_id": None, "max_time": 9.0}, "pad_token_id"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_inputs(model, name, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("computed"))
    arguments, message = bad_inputs()[name]
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


# --- several processes -----------------------------------------------------------------------------------------------


def decode_in_step_with_others(rank, name, folder, port):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = FAMILIES[name].load()
    passes = []
    model.register_forward_hook(lambda *args: passes.append(1))
    prompt = torch.arange(5 + rank)[None]
    output = model.generate(
        prompt,
        max_new_tokens=8,
        unmasking="confidence",
        steps=(3, 8)[rank],
        synced_gpus=True,
        return_dict_in_generate=True,
    )
    torch.save((len(passes), output.num_forward_passes.item(), output.sequences), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("family", MOSTLY_SLOW, indirect=True)
@pytest.mark.journey
def test_synced_processes_make_the_same_number_of_passes(family, model, tmp_path):
    """Under ZeRO-3 and FSDP a process that is done must go on making passes, or the others wait for it for ever."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(decode_in_step_with_others, (family.name, str(tmp_path), port), nprocs=2)
    for rank, steps in enumerate((3, 8)):
        passes, counted, sequences = torch.load(tmp_path / f"{rank}.pt")
        assert (passes, counted) == (8, steps)
        prompt = torch.arange(5 + rank)[None]
        assert torch.equal(sequences, model.generate(prompt, max_new_tokens=8, unmasking="confidence", steps=steps))
