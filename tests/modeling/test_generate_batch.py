"""`generate_batch()` and `generate_each()`: rows that leave and join, with what each would have alone."""

import itertools
import logging
import socket
import threading

import pytest
import torch
from transformers import BatchEncoding, MaxTimeCriteria
from transformers.generation import LogitsProcessor
from transformers.generation.continuous_batching.requests import RequestStatus

from dparallel.modeling import UnmaskingFilter, UnmaskingFilterConfig, decoding_loop, unmasking
from tests.families import FAMILIES, MOSTLY_SLOW
from tests.golden import CHECKPOINT, STUDENT
from tests.modeling.test_block_cache import CACHES, name_of
from tests.modeling.test_captured_step import prompts
from tests.modeling.test_generation import EOS, MASK, POLICY_SETTINGS, StopAt

DRAWN = [
    {"unmasking": "random", "steps": 7},
    {"unmasking": "random", "steps": 7, "schedule": "ancestral"},
    {"unmasking": "confidence", "steps": 7, "unmasking_temperature": 0.5},
    {"unmasking": "confidence_threshold", "threshold": 0.5, "do_sample": True, "temperature": 1.5, "top_k": 20},
]
WITHOUT_ROUNDING = {"unmasking": "confidence", "steps": 4, "max_new_tokens": 8, "block_length": 4}


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[EOS] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def assert_equal(outputs, batch, width):
    """The same answers, from `generate_batch` and from `generate`."""
    for i, output in enumerate(outputs.values()):
        length = len(output.generated_tokens)
        assert output.generated_tokens == batch.sequences[i, width : width + length].tolist(), i
        assert output.num_forward_passes == batch.num_forward_passes[i]
        assert output.unmasking_step == batch.unmasking_step[i, :length].tolist()
        assert output.tokens_per_forward == pytest.approx(batch.tokens_per_forward[i].item())
        assert output.num_tokens == batch.num_tokens[i]


SETTINGS = [*POLICY_SETTINGS, *DRAWN]
# All policies without a cache, and all caches with one policy: quick; the rest is slow.
QUICK = [(settings, {}) for settings in SETTINGS] + [(SETTINGS[0], cache) for cache in CACHES]
ALL = [
    pytest.param(settings, cache, marks=() if (settings, cache) in QUICK else pytest.mark.slow)
    for settings in SETTINGS
    for cache in [{}, *CACHES]
]


@pytest.mark.parametrize(("settings", "cache"), ALL, ids=name_of)
def test_equals_generate(family, model, settings, cache):
    """Prompts of all lengths, of which seven are decoded at a time."""
    rows = prompts(24, seed=6, longest=60)
    settings = settings | cache | {"max_new_tokens": 20, "block_length": 8, "eos_token_id": list(family.frequent)}
    settings["pad_token_id"] = EOS
    torch.manual_seed(3)
    outputs = model.generate_batch(rows, max_batch_size=7, **settings)
    torch.manual_seed(3)
    ids, mask = padded(rows)
    batch = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    assert_equal(outputs, batch, ids.shape[1])
    assert len({output.num_forward_passes for output in outputs.values()}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "cache"),
    [(settings, {}) for settings in SETTINGS if settings not in DRAWN] + [(SETTINGS[0], cache) for cache in CACHES],
    ids=name_of,
)
def test_two_hundred_prompts_alone(family, settings, cache):
    """In `generate_batch`, all at a time in `generate`, and one by one; in float64, as among so many predictions there
    are two logits that float32 cannot tell apart."""
    model = family.load().double()
    rows = prompts(200, seed=16, longest=61)
    settings = settings | cache | {"max_new_tokens": 20, "block_length": 8, "eos_token_id": list(family.frequent)}
    settings |= {"pad_token_id": EOS, "return_dict_in_generate": True}
    outputs, (ids, mask) = model.generate_batch(rows, max_batch_size=7, **settings), padded(rows)
    assert_equal(outputs, model.generate(ids, attention_mask=mask, **settings), ids.shape[1])
    for row, output in zip(rows, outputs.values(), strict=True):
        alone = model.generate(torch.tensor([row]), **settings)
        assert (
            output.generated_tokens == alone.sequences[0, len(row) : len(row) + len(output.generated_tokens)].tolist()
        )
        assert output.num_forward_passes == alone.num_forward_passes.item()


def test_equals_generate_with_a_filter(family, model):
    rows = prompts(20, seed=7)
    torch.manual_seed(0)
    settings = {"unmasking": "learned_filter", "threshold": 0.5, "block_length": 6, "max_new_tokens": 20}
    settings |= {"unmasking_filter": UnmaskingFilter(UnmaskingFilterConfig(block_length=6)), "pad_token_id": EOS}
    ids, mask = padded(rows)
    batch = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    assert_equal(model.generate_batch(rows, max_batch_size=7, **settings), batch, ids.shape[1])


def test_the_output_is_transformers_own(model):
    rows = [[5, 6, 7], [8], [9, 10, 11, 12]]
    outputs = model.generate_batch(rows, max_batch_size=2, max_new_tokens=8, progress_bar=True)
    assert list(outputs) == ["req_0", "req_1", "req_2"]
    for i, output in enumerate(outputs.values()):
        assert (output.prompt_ids, output.index, output.error) == (rows[i], i, None)
        assert output.status == RequestStatus.FINISHED and output.is_finished()
        assert len(output.unmasking_step) == len(output.unmasking_confidence) == len(output.generated_tokens)
        assert all(0 < confidence <= 1 for confidence in output.unmasking_confidence)
    assert model.generate_batch([]) == {} and list(model.generate_each([])) == []


def test_several_answers_to_a_prompt(model):
    settings = {
        "max_new_tokens": 24,
        "do_sample": True,
        "temperature": 3.0,
        "num_return_sequences": 3,
        "stop_at_eos": False,
    }
    torch.manual_seed(1)
    outputs = model.generate_batch([[5, 6], [7]], max_batch_size=2, **settings)
    assert list(outputs) == [f"req_{i}{child}" for i in (0, 1) for child in ("__child#0", "__child#1", "")]
    assert len({tuple(output.generated_tokens) for output in outputs.values()}) == 6
    torch.manual_seed(1)
    ids, mask = padded([[5, 6], [7]])
    batch = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    assert [output.generated_tokens for output in outputs.values()] == batch.sequences[:, 2:].tolist()


@pytest.mark.parametrize("slots", [16, 48, 64, 65])
def test_no_row_waits_for_another(slots, monkeypatch):
    """Rows in all passes over the sum of the rows' own passes; and of one batch, as many passes as its slowest row."""
    model = FAMILIES["llada"].load()
    rows, computed = prompts(512, seed=8, longest=12), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    settings = {"max_new_tokens": 12, "block_length": 4, "unmasking": "entropy_threshold", "threshold": 2.0}
    outputs = model.generate_batch(rows, max_batch_size=slots, **settings)
    passes = [output.num_forward_passes for output in outputs.values()]
    assert sum(computed) == sum(passes) and max(computed) == slots and len(set(passes)) > 3
    computed.clear()
    ids, mask = padded(rows[:64])
    model.generate(ids, attention_mask=mask, **settings)
    assert len(computed) == max(passes[:64])


@pytest.mark.parametrize("family", MOSTLY_SLOW, indirect=True)
@pytest.mark.journey
def test_computed_positions_with_a_cache(family):
    """What passes compute, over what their rows need: nothing is computed for the sake of other rows."""
    model = family.load()
    rows, computed = [prompt * 4 for prompt in prompts(32, seed=9, longest=8)], []
    rows = [row[:12] for row in rows if len(row) >= 12]
    model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    settings = {"max_new_tokens": 24, "block_length": 8, "unmasking": "entropy_threshold", "threshold": 1.0}
    for cache in CACHES:
        model.generate_batch(rows, max_batch_size=8, **settings, **cache)
        together = sum(computed)
        computed.clear()
        for row in rows:
            model.generate(torch.tensor([row]), **settings, **cache)
        assert together <= 1.15 * sum(computed)
        computed.clear()


# --- prompts that come one by one ------------------------------------------------------------------------------------


def test_prompts_are_taken_when_a_row_is_free(model):
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield [5 + number % 50, 6]

    outputs = model.generate_each(endless(), max_batch_size=4, max_length=20, **WITHOUT_ROUNDING)
    assert not taken
    for count, output in enumerate(itertools.islice(outputs, 10), 1):
        assert len(taken) <= count + 2 * 4 and output.prompt_ids == [5 + output.index % 50, 6]
        single = model.generate(torch.tensor([output.prompt_ids]), **WITHOUT_ROUNDING)[0, 2:].tolist()
        assert output.generated_tokens == single[: len(output.generated_tokens)]


def test_a_prompt_that_cannot_be_decoded_harms_no_other(model):
    inputs = [[5, 6], [5, 999], "text", [7] * 40, [MASK], [8, 9]]
    outputs = list(model.generate_each(iter(inputs), max_batch_size=2, max_length=20, **WITHOUT_ROUNDING))
    by_index = {output.index: output for output in outputs}
    assert sorted(by_index) == list(range(6))
    for index, message in (
        (1, "`inputs[1]` holds ids from 5 to 999"), (2, "`inputs[2]` is 'text'"),
        (3, "`max_length=20` is not allowed: it must be at least 48"), (4, "must not contain [MASK]"),
    ):  # fmt: skip
        assert by_index[index].status == RequestStatus.FAILED and message in by_index[index].error
    alone = model.generate_batch([inputs[0], inputs[5]], **WITHOUT_ROUNDING)
    for output, index in zip(alone.values(), (0, 5), strict=True):
        assert output.generated_tokens == by_index[index].generated_tokens


def test_stopping_early_leaves_nothing_behind(model):
    outputs = model.generate_each([[5, 6]] * 9, max_batch_size=2, **WITHOUT_ROUNDING)
    next(outputs)
    outputs.close()
    assert len(model.generate_batch([[5, 6]] * 3, **WITHOUT_ROUNDING)) == 3


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        ([[5]] * 37 + [[5, 320]], {}, r"`inputs\[37\]` holds ids from 5 to 320: they must be from 0 to 319"),
        ([[5], [MASK]], {}, r"`inputs\[1\]` .* must not contain \[MASK\]"),
        ([[5], []], {"bos_token_id": None}, r"`inputs\[1\]` is empty"),
        ([[5], [1.5]], {}, r"`inputs\[1\]` is \[1\.5\]: it must be a list of token ids"),
        ([5, 6], {}, r"`inputs\[0\]` is 5: it must be a list"),
        ([BatchEncoding({"input_ids": [5]})], {}, r"must be a list of token ids, such as its `\[\"input_ids\"\]`"),
        ([[5]], {"batch_size": 8}, "`batch_size` is not an argument here: it must be `max_batch_size`"),
        ([[5]], {"max_tokens": 8}, "`max_tokens` is not an argument here: it must be `max_new_tokens`"),
        ([[5], [6] * 505], {"max_new_tokens": 8}, r"`inputs\[1\]`: A prompt of 505 tokens .* at most .*512"),
        ([[5]], {"max_batch_size": 0}, "`max_batch_size=0` is not allowed: it must be an integer of at least 1"),
        ([[5]], {"max_batch_size": True}, "`max_batch_size=True`"),
        ([[5]], {"continuous_batching_config": object()}, "`continuous_batching_config="),
        ([[5]], {"record_timestamps": True}, "`record_timestamps=True`"),
        ([[5]], {"persistent_manager": True}, "`persistent_manager=True`"),
        ([[5]], {"streamer": object()}, "streamer"),
        ([[5]], {"gen_length": 5}, "`max_new_tokens`"),
        ("text", {}, "`inputs` is a str: it must be a list of lists of token ids"),
        (BatchEncoding({"input_ids": [[5]]}), {}, "`inputs` is a BatchEncoding: .* such as the 'input_ids'"),
        (torch.tensor([[5]]), {}, "`inputs` is a Tensor: "),
        ([[5]], {"unmasking": "greedy"}, "`unmasking='greedy'`"),
    ],
)
def test_wrong_input_is_named_before_any_computation(model, inputs, settings, message, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        model.generate_batch(inputs, **settings)


def test_an_iterable_needs_a_length(model):
    with pytest.raises(ValueError, match="`max_length=None` is not allowed"):
        model.generate_each(iter([[5]]))


def test_continuous_batching_of_transformers_is_refused(model):
    for name in ("init_continuous_batching", "continuous_batching_context_manager"):
        with pytest.raises(NotImplementedError, match="generate_batch"):
            getattr(model, name)()


# --- what users hand in ----------------------------------------------------------------------------------------------


class Ban(LogitsProcessor):
    """Bans the last token of the text so far, and notes the shapes that it sees."""

    def __init__(self):
        self.shapes = []

    def __call__(self, input_ids, scores):
        self.shapes.append((tuple(input_ids.shape), tuple(scores.shape)))
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


def test_processors_and_criteria_see_one_row(family, model):
    rows = prompts(9, seed=10, longest=9)
    settings = {"max_new_tokens": 12, "block_length": 4, "unmasking": "confidence", "stop_at_eos": False}
    settings |= {"pad_token_id": EOS, "repetition_penalty": 1.3, "min_new_tokens": 3}
    ban, criterion = Ban(), StopAt([14])
    outputs = model.generate_batch(
        rows, max_batch_size=4, logits_processor=[ban], stopping_criteria=[criterion], **settings
    )
    assert {shape[0] for pair in ban.shapes for shape in pair} == {1}
    for row, output in zip(rows, outputs.values(), strict=True):
        alone = model.generate(
            torch.tensor([row]), logits_processor=[Ban()], stopping_criteria=[StopAt([14])], **settings
        )[0, len(row) :].tolist()
        length = min(14 - len(row), 12)
        assert output.generated_tokens == alone[:length] and len(output.generated_tokens) == length


def test_time_is_up(model):
    outputs = model.generate_batch([[5, 6], [7], [8]], max_batch_size=2, max_time=0.0, **WITHOUT_ROUNDING)
    begun = [output for output in outputs.values() if output.error is None]
    assert len(outputs) == 3 and len(begun) == 2 and all(output.num_forward_passes == 1 for output in begun)
    (left,) = [output for output in outputs.values() if output.error is not None]
    assert left.status == RequestStatus.FAILED and "`max_time`" in left.error


@pytest.mark.parametrize("calls", range(1, 12))
def test_time_that_is_over_just_as_prompts_come(model, monkeypatch, calls):
    """Whenever the clock strikes: what has had a pass has an answer, and what has not is said not to have begun."""
    clock = itertools.count(1)
    monkeypatch.setattr(
        MaxTimeCriteria, "__call__", lambda self, ids, scores: torch.tensor([next(clock) >= calls] * len(ids))
    )
    settings = {"max_new_tokens": 12, "block_length": 6, "unmasking": "confidence_threshold", "threshold": 0.4}
    outputs = model.generate_batch(prompts(10, seed=4), max_batch_size=3, max_time=5.0, **settings)
    begun = [output for output in outputs.values() if output.error is None]
    assert len(outputs) == 10 and 3 <= len(begun) < 10
    assert all(output.num_forward_passes > 0 for output in begun)
    assert all("`max_time` was over" in output.error for output in outputs.values() if output not in begun)


# --- memory, threads, processes --------------------------------------------------------------------------------------


def test_out_of_memory_makes_the_batch_smaller(model, monkeypatch, caplog):
    rows, step = prompts(24, seed=11, longest=9), decoding_loop.decode_step
    expected = model.generate_batch(rows, max_batch_size=4, **WITHOUT_ROUNDING)
    sizes = []

    def limited(model, canvas, settings, *arguments):
        sizes.append(settings.shape.rows)
        if settings.shape.rows > 5 or len(sizes) == 20:
            raise torch.OutOfMemoryError("no memory")
        return step(model, canvas, settings, *arguments)

    monkeypatch.setattr(decoding_loop, "decode_step", limited)
    with caplog.at_level(logging.WARNING):
        found = model.generate_batch(rows, max_batch_size=16, **WITHOUT_ROUNDING)
    assert {key: output.generated_tokens for key, output in found.items()} == {
        key: output.generated_tokens for key, output in expected.items()
    }
    assert [output.num_forward_passes for output in found.values()] == [4] * 24
    assert caplog.text.count("Out of memory with") == 3  # 16 to 8, to 4, and once more to 2
    with pytest.raises(torch.OutOfMemoryError):
        monkeypatch.setattr(decoding_loop, "decode_step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        model.generate_batch(rows, max_batch_size=4, **WITHOUT_ROUNDING)


def test_threads_that_share_a_model(model):
    rows = prompts(8, seed=12, longest=9)
    expected = [model.generate(torch.tensor([row]), **WITHOUT_ROUNDING).tolist() for row in rows]
    found = [None] * len(rows)

    def decode(i):
        found[i] = model.generate(torch.tensor([rows[i]]), **WITHOUT_ROUNDING).tolist()

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def leave_early(rank, folder, port):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = FAMILIES["llada"].load()
    outputs = model.generate_each(
        [[5 + rank, 6]] * (2 + 3 * rank), max_batch_size=2, synced_gpus=True, **WITHOUT_ROUNDING
    )
    first = next(iter(outputs))  # and no more: the other process must not wait for this one
    torch.save(first.generated_tokens, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.journey
def test_a_process_that_leaves_early_stops_no_other(models, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(leave_early, (str(tmp_path), port), nprocs=2)
    for rank in range(2):
        expected = models["llada_tiny"].generate_batch([[5 + rank, 6]], **WITHOUT_ROUNDING)["req_0"]
        assert torch.load(tmp_path / f"{rank}.pt") == expected.generated_tokens


# --- an example model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [STUDENT, CHECKPOINT], ids=["student", "teacher"])
def test_policies_that_are_defined_anew_are_used(folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    settings = {"max_new_tokens": 32, "unmasking": "confidence_threshold", "stop_at_eos": False}
    before = model.generate_batch([[5, 6]], **settings)["req_0"].num_forward_passes
    policy = unmasking.POLICIES["confidence_threshold"]
    everything = policy._replace(select=lambda statistics, masked, *, threshold: masked)
    monkeypatch.setitem(unmasking.POLICIES, "confidence_threshold", everything)
    assert model.generate_batch([[5, 6]], **settings)["req_0"].num_forward_passes == 1 < before
