"""Captured steps: what is replayed decodes what is run step by step.

On a CPU a recording stands in for a CUDA graph: it is the first step of its kind, called again. Whatever such a step
reads beside the canvas is as stale as it would be in a graph. On a GPU the same tests take real graphs.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dparallel.modeling import captured_step, generation_diffusion, unmasking
from dparallel.modeling.captured_step import CapturedSteps, captured_steps
from tests.families import FAMILIES
from tests.modeling.test_block_cache import CACHES, name_of
from tests.modeling.test_generation import EOS, POLICY_SETTINGS, padded_batch

gpu = pytest.mark.gpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=gpu)])
def device(request, monkeypatch):
    """Where steps are captured, with the captures counted in `device.captures`."""
    captures = []
    if request.param == "cuda":
        capture = CapturedSteps._capture
        monkeypatch.setattr(
            CapturedSteps, "_capture", lambda self, *args: (captures.append(1), capture(self, *args))[1]
        )
    else:
        steps = CapturedSteps(None)
        monkeypatch.setattr(
            CapturedSteps, "_capture", lambda self, _, step: (captures.append(1), SimpleNamespace(replay=step))[1]
        )
        monkeypatch.setattr(
            generation_diffusion, "prepare_captured_steps", lambda model: None if steps.failed else steps
        )
        properties = SimpleNamespace(total_memory=8 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    yield SimpleNamespace(name=request.param, captures=captures)
    captured_step._steps_of_models.clear()


def prompts(count, seed, longest=40):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 317, (length,), generator=generator).tolist() for length in lengths]


def both(model, ids, **settings):
    """What captured and uncaptured steps decode."""
    for disable in (False, True):
        yield model.generate(ids, disable_compile=disable, return_dict_in_generate=True, **settings)


def assert_same(captured, plain):
    for name in ("sequences", "num_forward_passes", "unmasking_step"):
        assert torch.equal(getattr(captured, name), getattr(plain, name)), name
    torch.testing.assert_close(captured.unmasking_confidence, plain.unmasking_confidence, atol=1e-4, rtol=1e-4)


# All policies without a cache, and all caches with one policy: quick; the rest is slow.
COMBINED = [
    pytest.param(settings, cache, marks=pytest.mark.slow if cache and settings is not POLICY_SETTINGS[0] else ())
    for settings in POLICY_SETTINGS[:-1]
    for cache in [{}, *CACHES]
]


@pytest.mark.parametrize(("settings", "cache"), COMBINED, ids=name_of)
def test_equals_plain_steps(device, family, settings, cache):
    """Prompts of all lengths one after the other, then a batch of them whose rows end at different times."""
    model = family.load().to(device.name)
    settings = settings | cache | {"max_new_tokens": 22, "block_length": 6, "pad_token_id": EOS}
    rows = prompts(10, seed=5)
    for row in rows[:4]:
        assert_same(*both(model, torch.tensor([row], device=device.name), **settings))
    ids, mask = (tensor.to(device.name) for tensor in padded_batch(rows))
    assert_same(*both(model, ids, attention_mask=mask, eos_token_id=list(family.frequent), **settings))
    assert device.captures


def test_a_block_causal_model(device, family):
    model = family.model.from_pretrained(family.golden, block_causal_length=6).to(device.name).eval()
    settings = {"max_new_tokens": 22, "pad_token_id": EOS, "do_sample": False, "unmasking": "entropy_threshold"}
    settings |= {"threshold": 0.8, "stop_at_eos": False}
    ids, mask = (tensor.to(device.name) for tensor in padded_batch(prompts(10, seed=5)))
    captured, plain = both(model, ids, attention_mask=mask, **settings)
    assert torch.equal(captured.sequences, plain.sequences) and device.captures


def test_a_conversation(device, family):
    """Keys and values of the turn before come into a canvas whose steps are captured already."""
    model = family.model.from_pretrained(family.golden, block_causal_length=6).to(device.name).eval()
    settings = {"max_new_tokens": 22, "do_sample": False, "unmasking": "entropy_threshold", "stop_at_eos": False}
    conversation = model.conversation_cache()
    ids = torch.tensor([prompts(1, seed=8)[0]], device=device.name)
    for _ in range(3):
        captured = model.generate(ids, past_key_values=conversation, **settings)
        assert torch.equal(captured, model.generate(ids, disable_compile=True, **settings))
        ids = torch.cat((captured, ids[:, :3]), dim=1)
    assert device.captures and len(conversation.ids[0]) > 60


def test_graphs_are_found_again(device, family):
    model = family.load().to(device.name)
    settings = {"max_new_tokens": 24, "block_length": 8, "unmasking": "entropy_threshold", "stop_at_eos": False}
    counts = []
    for seed in range(6):  # other prompts, lengths and thresholds
        ids = torch.randint(0, 317, (1, 2 + seed), generator=torch.Generator().manual_seed(seed)).to(device.name)
        assert_same(*both(model, ids, threshold=0.1 + 0.05 * seed, block_cache="dual", **settings))
        counts.append(len(device.captures))
    assert counts == [2] * 6  # a whole pass and a pass over a block
    ids = torch.randint(0, 317, (1, 70), device=device.name)
    assert_same(*both(model, ids, threshold=0.1, block_cache="dual", **settings))
    assert len(device.captures) == 4


def test_a_policy_that_is_defined_anew_is_not_replayed(device, family, monkeypatch):
    model, ids = family.load().to(device.name), torch.tensor([[5, 6, 7]], device=device.name)
    settings = {"max_new_tokens": 12, "block_length": 6, "unmasking": "confidence_threshold", "stop_at_eos": False}
    captured, plain = both(model, ids, **settings)
    assert_same(captured, plain)
    everything = unmasking.POLICIES["confidence_threshold"]._replace(
        select=lambda statistics, masked, *, threshold: masked
    )
    monkeypatch.setitem(unmasking.POLICIES, "confidence_threshold", everything)
    captured, plain = both(model, ids, **settings)
    assert_same(captured, plain)
    assert captured.num_forward_passes.item() == 2


def test_outputs_are_the_callers(device, family):
    model = family.load().to(device.name)
    ids = [torch.tensor([row * 3], device=device.name) for row in prompts(2, seed=1, longest=5)]
    first = model.generate(ids[0], max_new_tokens=12, return_dict_in_generate=True)
    kept = {name: value.clone() for name, value in first.items()}
    model.generate(ids[1], max_new_tokens=12)
    assert all(torch.equal(first[name], value) for name, value in kept.items())


def test_sampling_draws_the_same(device, family):
    model = family.load().to(device.name)
    ids = torch.tensor([[5, 6, 7]] * 4, device=device.name)
    outputs = []
    for temperature in (2.0, 0.7):
        for disable in (False, True):
            torch.manual_seed(3)
            settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "disable_compile": disable}
            settings |= {"unmasking": "random", "steps": 6, "max_new_tokens": 12, "block_length": 6}
            outputs.append(model.generate(ids, stop_at_eos=False, **settings).tolist())
    assert outputs[0] == outputs[1] and outputs[2] == outputs[3] and outputs[0] != outputs[2]
    assert outputs[0][0] != outputs[0][1]  # rows draw by themselves


def test_criteria_processors_streamers_and_generators_go_on_working(device, family):
    model = family.load().to(device.name)
    ids = torch.tensor([[5, 6, 7]], device=device.name)
    settings = {"max_new_tokens": 12, "block_length": 6, "unmasking": "confidence", "steps": 6}

    class Streamer:
        def __init__(self):
            self.parts = []

        def put(self, value):
            self.parts.append(value.flatten().tolist())

        def end(self):
            pass

    def stop_at_ten(ids, scores):
        return torch.full((len(ids),), ids.shape[1] == 10, device=ids.device)

    for extra in (
        {"stopping_criteria": [stop_at_ten], "pad_token_id": EOS},
        {"logits_processor": [lambda ids, scores: scores.roll(1, dims=-1)]},
        {"max_time": 1e-9},
    ):
        captured, plain = (
            model.generate(ids, disable_compile=disable, **settings, **extra) for disable in (False, True)
        )
        assert torch.equal(captured, plain)
    streamer = Streamer()
    answer = model.generate(ids, streamer=streamer, stop_at_eos=False, **settings)
    assert [token for part in streamer.parts for token in part] == answer[0].tolist()
    draws = [
        model.generate(
            ids,
            do_sample=True,
            generator=torch.Generator(device.name).manual_seed(1),
            disable_compile=disable,
            **settings,
        )
        for disable in (False, True)
    ]
    assert torch.equal(*draws)


def test_memory_is_bounded(device, family, monkeypatch):
    model = family.load().to(device.name)
    kept = []
    give_back = CapturedSteps.give_back

    def counted(self, canvas):
        give_back(self, canvas)
        kept.append((len(self.canvases), max(len(each.graphs) for each in self.canvases.values())))

    monkeypatch.setattr(CapturedSteps, "give_back", counted)
    monkeypatch.setattr(captured_step, "MAX_CANVASES", 3)
    monkeypatch.setattr(captured_step, "MAX_GRAPHS", 2)
    for length in (6, 38, 70, 102, 6):
        settings = {"max_new_tokens": length, "block_length": 3, "block_cache": "prefix", "unmasking": "confidence"}
        assert_same(*both(model, torch.tensor([[5, 6]], device=device.name), **settings))
    assert max(count for count, _ in kept) == 3 and max(graphs for _, graphs in kept) == 2
    monkeypatch.setattr(captured_step, "MAX_MEMORY_SHARE", 0.0)
    for _ in range(2):  # with nothing left of what was there, captures go on
        captures = len(device.captures)
        for length in (7, 32):
            assert_same(*both(model, torch.tensor([[5, 6]], device=device.name), max_new_tokens=length))
            assert kept[-1][0] == 1
        assert len(device.captures) == captures + 2


def test_a_capture_that_fails_is_no_trouble(device, family, monkeypatch, caplog):
    model = family.load().to(device.name)

    def fail(self, device, step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CapturedSteps, "_capture", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(*both(model, torch.tensor([[5, 6]], device=device.name), max_new_tokens=12))
    assert caplog.text.count("Steps are not captured as CUDA graphs, since that failed: operation not permitted") == 1


def test_what_is_not_captured(family):
    assert captured_steps(family.load()) is None  # on a CPU
    for change in (
        lambda model: model.get_output_embeddings().register_forward_hook(lambda *_: None),
        lambda model: model.compile(),
        lambda model: get_peft_model(model, LoraConfig(target_modules="all-linear")),
    ):
        model = family.make()
        assert not any(map(captured_step._is_changeable, model.modules()))
        change(model)
        assert any(map(captured_step._is_changeable, model.modules()))


def test_asking_for_hidden_states_once_changes_nothing(family):
    model = family.load()
    assert model(torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states
    assert not any(map(captured_step._is_changeable, model.modules()))


def test_a_generator_is_no_hindrance(device, family, prompt):
    model, settings = family.load().to(device.name), {"max_new_tokens": 12, "block_length": 6, "do_sample": True}
    captured, plain = (
        model.generate(prompt.to(device.name), generator=torch.Generator(device.name).manual_seed(5),
                       disable_compile=disable, return_dict_in_generate=True, **settings)
        for disable in (False, True)
    )  # fmt: skip
    assert_same(captured, plain)
    assert device.captures


@gpu
def test_hooks_adapters_and_moved_weights_are_seen():
    model, family = FAMILIES["llada"].load().cuda(), FAMILIES["llada"]
    ids, settings = torch.tensor([[5, 6, 7]], device="cuda"), {"max_new_tokens": 12, "block_length": 6}
    assert captured_steps(model) is None  # asking does not prepare them
    first = model.generate(ids, **settings)
    steps = captured_steps(model)
    assert steps is captured_steps(model) and steps.canvases
    with torch.no_grad():
        for parameter in model.parameters():  # in place: graphs go on, with the new weights
            parameter.mul_(1.3)
    assert captured_steps(model) is steps
    scaled = model.generate(ids, **settings)
    assert torch.equal(scaled, model.generate(ids, disable_compile=True, **settings)) and not torch.equal(
        scaled, first
    )
    model.load_state_dict({k: v.clone() for k, v in family.load().state_dict().items()}, assign=True)
    model.cuda()
    assert torch.equal(model.generate(ids, **settings), first)
    model.to(torch.float64).to(torch.float32)
    assert captured_steps(model) is None and torch.equal(model.generate(ids, **settings), first)
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, out: out.roll(1, dims=-1))
    assert captured_steps(model) is None
    rolled = model.generate(ids, **settings)
    handle.remove()
    assert not torch.equal(rolled, first) and torch.equal(model.generate(ids, **settings), first)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert captured_steps(model) is None
    adapted = model.generate(ids, **settings)
    model.disable_adapters()
    assert torch.equal(model.generate(ids, **settings), first) and not torch.equal(adapted, first)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert captured_steps(model) is None
