"""Attention that is causal between blocks, in each family: an exact cache, and the slow way that computes all."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dparallel.modeling import DreamConfig, DreamModel, LLaDAModelLM, SDARForCausalLM
from tests.families import FAMILIES
from tests.golden import FIXTURES
from tests.modeling.test_captured_step import prompts
from tests.modeling.test_generate_batch import DRAWN, assert_equal, padded
from tests.modeling.test_generation import EOS, POLICY_SETTINGS, StopAt

CLASSES = {"llada": LLaDAModelLM, "dream": DreamModel, "sdar": SDARForCausalLM}
NAMES = {model: name for name, model in CLASSES.items()}
SETTINGS = [settings for settings in POLICY_SETTINGS if "repetition_penalty" not in settings]
SETTINGS += [*DRAWN, {"unmasking": "leftmost"}, {"unmasking": "confidence_threshold", "steps_per_block": 3}]


def load(name, length=6):
    return CLASSES[name].from_pretrained(FIXTURES / f"{name}_tiny", block_causal_length=length).eval()


@pytest.fixture(scope="module", params=CLASSES)
def block_model(request):
    return load(request.param)


@torch.no_grad()
def test_what_a_position_sees(block_model):
    """All of its own block and of those before, and nothing behind."""
    ids = torch.tensor([[9, *range(5, 18)]])
    whole = block_model(ids).logits[0]
    for stop in (6, 12, 14):
        torch.testing.assert_close(whole[:stop], block_model(ids[:, :stop]).logits[0], atol=1e-5, rtol=1e-5)
    both_ways = load(NAMES[type(block_model)], None)
    torch.testing.assert_close(whole[:6], both_ways(ids[:, :6]).logits[0], atol=1e-5, rtol=1e-5)
    for changed in range(14):
        other = ids.clone()
        other[0, changed] = 30
        differs = (block_model(other).logits[0] - whole).abs().amax(dim=-1) > 1e-4
        assert differs.tolist() == [position >= changed // 6 * 6 for position in range(14)]


@torch.no_grad()
def test_blocks_begin_where_the_row_does(block_model):
    """Padding on the left or on the right changes nothing."""
    row = prompts(1, seed=3)[0][:9] + list(range(5, 14))
    alone = block_model(torch.tensor([row])).logits[0]
    for before, after in ((4, 0), (0, 5), (7, 2)):
        ids = torch.tensor([[EOS] * before + row + [EOS] * after])
        mask = torch.tensor([[0] * before + [1] * len(row) + [0] * after])
        logits = block_model(ids, attention_mask=mask).logits[0, before : before + len(row)]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_cache_is_exact(block_model, settings):
    """Cached = uncached, in a batch, one by one, and with rows that join and leave."""
    rows, is_drawn = prompts(12, seed=5), settings in DRAWN
    family = FAMILIES["dream" if isinstance(block_model, DreamModel) else "llada"]
    settings = settings | {"max_new_tokens": 20, "eos_token_id": list(family.frequent), "pad_token_id": EOS}
    settings["do_sample"] = settings.get("do_sample", False)
    (ids, mask), outputs = padded(rows), {}
    for cache in ("none", "exact"):
        torch.manual_seed(4)
        outputs[cache] = block_model.generate(
            ids, attention_mask=mask, block_cache=cache, return_dict_in_generate=True, **settings
        )
    for name in ("sequences", "num_forward_passes", "unmasking_step"):
        assert torch.equal(outputs["none"][name], outputs["exact"][name]), name
    torch.manual_seed(4)
    assert_equal(block_model.generate_batch(rows, max_batch_size=7, **settings), outputs["none"], ids.shape[1])
    for i, row in enumerate([] if is_drawn else rows[:3]):
        alone = block_model.generate(torch.tensor([row]), return_dict_in_generate=True, **settings)
        assert torch.equal(alone.sequences[0, len(row) :], outputs["none"].sequences[i, ids.shape[1] :])


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_the_cache_is_exact_for_two_hundred_prompts(name):
    model, rows = load(name), prompts(200, seed=6, longest=61)
    settings = {"max_new_tokens": 30, "pad_token_id": EOS, "unmasking": "entropy_threshold", "threshold": 1.0}
    settings["do_sample"] = False
    found = [
        model.generate_batch(rows, max_batch_size=9, block_cache=cache, **settings) for cache in ("none", "exact")
    ]
    for one, other in zip(*(each.values() for each in found), strict=True):
        assert one.generated_tokens == other.generated_tokens and one.unmasking_step == other.unmasking_step


def test_only_the_block_is_computed(block_model):
    """The first pass computes the prompt and the first block; a block's first pass, the block before along with it."""
    sizes, shift = [], block_model.logits_shift
    hook = block_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    settings = {"unmasking": "confidence", "steps_per_block": 2, "stop_at_eos": False, "do_sample": False}
    try:
        block_model.generate(torch.tensor([[5] * 8]), max_new_tokens=13, **settings)  # blocks of 4, 6 and 3 masks
    finally:
        hook.remove()
    assert sizes == [12, 6, 12, 6 + shift, 9]


def test_one_token_a_pass_in_blocks_of_any_length(block_model):
    output = block_model.generate(
        torch.tensor([[5] * 8]), max_new_tokens=17, unmasking="confidence", stop_at_eos=False, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert output.num_forward_passes.item() == 17


def test_criteria_and_processors(block_model):
    """Rows whose blocks begin at other places: criteria and processors see one row at a time."""
    rows = prompts(5, seed=9, longest=9)
    settings = {"max_new_tokens": 12, "unmasking": "confidence", "stop_at_eos": False, "do_sample": False}
    settings |= {"pad_token_id": EOS, "repetition_penalty": 1.3}
    ids, mask = padded(rows)
    batch = block_model.generate(ids, attention_mask=mask, stopping_criteria=[StopAt([14])], **settings)
    for i, row in enumerate(rows):
        alone = block_model.generate(torch.tensor([row]), stopping_criteria=[StopAt([14])], **settings)
        assert batch[i, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_of_one_token_are_autoregressive(tied):
    """With a shift of one and blocks of one token, Dream is Qwen2: the same logits and the same greedy tokens."""
    shape = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512,
        "tie_word_embeddings": tied, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(Qwen2Config(**shape, eos_token_id=48, pad_token_id=48)).eval()
    for parameter in qwen.parameters():
        parameter.mul_(5)
    dream = DreamModel(DreamConfig(**shape, block_causal_length=1, mask_token_id=49, eos_token_id=48, pad_token_id=48,
                                   bos_token_id=48)).eval()  # fmt: skip
    dream.load_state_dict(qwen.state_dict())
    ids = torch.randint(0, 48, (3, 17), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(dream(ids).logits, qwen(ids).logits, atol=1e-5, rtol=1e-5)
    expected = qwen.generate(ids, max_new_tokens=24, do_sample=False, suppress_tokens=[49])
    for cache in ("exact", "none"):
        found = dream.generate(ids, max_new_tokens=24, block_cache=cache, do_sample=False)
        assert torch.equal(found[:, : expected.shape[1]], expected)
    assert len(set(expected[:, 17:].flatten().tolist())) > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_cache": "dual"}, "`block_cache='dual'` is not allowed: it must be 'exact' or 'none'"),
        ({"block_length": 32}, "`block_length=32` is not allowed: it must be 6, the length of the blocks"),
        ({"steps_per_block": 0}, "`steps_per_block=0` is not allowed"),
        ({"steps_per_block": 2, "schedule": "linear_time"}, "`steps_per_block=2` needs `schedule='even'`"),
        ({"denoising_steps": 4}, "`denoising_steps` is not an argument here: it must be `steps_per_block`"),
    ],
)
def test_what_does_not_fit_is_refused(block_model, settings, message):
    with pytest.raises(ValueError, match=message):
        block_model.generate(torch.tensor([[5, 6]]), do_sample=False, **settings)


def test_an_exact_cache_needs_blocks(model):
    with pytest.raises(ValueError, match="'exact' is for block-causal models"):
        model.generate(torch.tensor([[5, 6]]), block_cache="exact")


def test_the_pattern_is_saved(block_model, tmp_path):
    block_model.save_pretrained(tmp_path)
    assert type(block_model).from_pretrained(tmp_path).config.block_causal_length == 6
