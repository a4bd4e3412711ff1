"""A conversation goes on: what is kept of one turn spares the next one computing it, and changes nothing."""

import copy

import pytest
import torch
from transformers import DynamicCache

from tests.families import FAMILIES
from tests.modeling.test_block_causal import CLASSES, load
from tests.modeling.test_captured_step import prompts
from tests.modeling.test_generate_batch import padded
from tests.modeling.test_generation import EOS

SETTINGS = {"max_new_tokens": 20, "pad_token_id": EOS, "do_sample": False, "return_dict_in_generate": True}
SETTINGS |= {"unmasking": "confidence_threshold", "threshold": 0.3, "stop_at_eos": False}


class Counter:
    """Of a model: the tokens that passes have computed since the last call."""

    def __init__(self, model):
        self.computed = 0
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.computed += kwargs["input_ids"].numel()

    def __call__(self):
        computed, self.computed = self.computed, 0
        return computed


def answer(model, texts, **settings):
    """The output, and the texts that it makes of those, without padding."""
    ids, mask = padded(texts)
    output = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), **(SETTINGS | settings))
    return output, [
        row[-int(length) - 20 :].tolist() for row, length in zip(output.sequences, mask.sum(1), strict=True)
    ]


def assert_same(output, expected):
    for name in ("sequences", "num_forward_passes", "unmasking_step"):
        assert torch.equal(output[name], expected[name]), name


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("length", [1, 6])
def test_three_turns(name, length):
    """The answers are those of the whole text computed anew, with a cache and without one, and each turn computes its
    own tokens and the block before alone."""
    model = load(name, length)
    counter, conversation, texts = Counter(model), model.conversation_cache(), prompts(7, seed=3)
    for turn in range(3):
        output, after = answer(model, texts, past_key_values=conversation)
        computed = counter()
        expected, _ = answer(model, texts)
        anew = counter()
        assert_same(output, expected)
        assert_same(output, answer(model, texts, block_cache="none")[0])
        assert computed == anew if turn == 0 else computed < anew
        for kept, text in zip(conversation.ids, after, strict=True):
            assert kept == text[: len(kept)] and len(kept) % length == 0 and len(text) - len(kept) <= 2 * length
        if turn:  # beside what the answer takes: the turn, and at most two blocks that were not final
            assert anew - computed >= sum(len(text) - 20 - 4 - 2 * length for text in texts)
        counter()
        texts = [[*text, 7, 8 + turn, 9] for text in after]


@pytest.mark.parametrize("name", CLASSES)
def test_texts_that_end(name):
    """A row that has ended early is kept up to its end, whatever is behind it."""
    model, family = load(name), FAMILIES["dream" if name == "dream" else "llada"]
    settings = {"eos_token_id": list(family.frequent), "stop_at_eos": True}
    conversation, texts = model.conversation_cache(), prompts(12, seed=5)
    for _turn in range(3):
        output, _ = answer(model, texts, past_key_values=conversation, **settings)
        assert_same(output, answer(model, texts, **settings)[0])
        ends = [len(text) + int(count) for text, count in zip(texts, output.num_tokens, strict=True)]
        assert all(len(kept) <= end for kept, end in zip(conversation.ids, ends, strict=True))
        answers = [row[-20:][:count].tolist() for row, count in zip(output.sequences, output.num_tokens, strict=True)]
        texts = [text + new + [7, 9] for text, new in zip(texts, answers, strict=True)]
    assert len({int(count) for count in output.num_tokens}) > 1


@pytest.mark.parametrize("name", CLASSES)
def test_earlier_turns_may_be_rewritten(name):
    """From the first difference on, everything is computed; a branch of the conversation does not disturb it."""
    model = load(name)
    counter, conversation = Counter(model), model.conversation_cache()
    _, texts = answer(model, [[5] * 30, [6] * 25], past_key_values=conversation)
    counter()
    branch = copy.deepcopy(conversation)
    for changed in (0, 11, 12, 29):
        others = [[*text[:changed], 77, *text[changed + 1 :], 7, 8] for text in texts]
        branched = copy.deepcopy(branch)
        output, _ = answer(model, others, past_key_values=branched)
        first = counter()
        assert_same(output, answer(model, others)[0])
        assert counter() - first == 2 * (changed // 6 * 6)
    assert_same(answer(model, texts, past_key_values=conversation)[0], answer(model, texts)[0])  # and the same again


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda model: DynamicCache(), {}, "is a DynamicCache: it must come from `model.conversation_cache"),
        (lambda model: load("llada").conversation_cache(), {}, "comes from another model"),
        (lambda model: model.conversation_cache(), {"block_cache": "none"}, "given with `block_cache='none'`"),
    ],
)
def test_what_cannot_serve_is_refused(make, settings, message):
    model = load("dream")
    with pytest.raises(ValueError, match=message):
        answer(model, [[5, 6]], past_key_values=make(model), **settings)


def test_as_many_rows_as_before():
    model = load("llada")
    conversation = model.conversation_cache()
    answer(model, [[5, 6], [7]], past_key_values=conversation)
    with pytest.raises(ValueError, match="holds 2 rows, but there are 3 prompts"):
        answer(model, [[5], [6], [7]], past_key_values=conversation)
    with pytest.raises(ValueError, match="`LLaDAModelLM` attends to the whole canvas"):
        FAMILIES["llada"].load().conversation_cache()
    with pytest.raises(ValueError, match="`past_key_values` is not an argument"):
        model.generate_batch([[5]], past_key_values=conversation)
