"""Dream's own: padded logits and original decoding of the published code, its configuration and its tokenizer."""

import json
import subprocess
import sys

import pytest
import torch
from families import FAMILIES
from golden import load_cases
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from dparallel.modeling import DreamConfig, DreamModel
from dparallel.modeling.unmasking import ancestral_schedule, linear_time_schedule, most

FAMILY = FAMILIES["dream"]
MASK = 319
ORIGINAL = [case for case in load_cases("generate_dream_tiny")[0] if case["family"] == "original_schedule"]


@pytest.fixture(scope="module")
def dream():
    return FAMILY.load()


def left_padding(lengths):
    width = max(lengths)
    return (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_logits_are_the_published_ones(attention):
    _, tensors = load_cases("logits_dream_tiny")
    case = {key.removeprefix("leftpad3."): value for key, value in tensors.items() if key.startswith("leftpad3.")}
    mask = case["attention_mask_2d"].long()
    logits = FAMILY.load(attn_implementation=attention)(
        case["input_ids"], attention_mask=mask, position_ids=case["position_ids"]
    ).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[mask.bool()], case["logits"][mask.bool()], atol=1e-3, rtol=0)


# --- diffusion_generate ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
@pytest.mark.parametrize("case", ORIGINAL, ids=lambda case: case["id"])
def test_original_decoding_is_the_published_one(dream, case):
    """The published loop also makes passes that write nothing: passes are compared by their order."""
    _, tensors = load_cases("generate_dream_tiny")
    ids, fill_step = tensors[f"{case['id']}.ids"], tensors[f"{case['id']}.fill_step"]
    ids, fill_step = ids.view(-1, ids.shape[-1]), fill_step.view(-1, 64)
    arguments = {"attention_mask": left_padding(case["lengths"])} if "lengths" in case else {}
    output = dream.diffusion_generate(
        ids[:, : case["prompt_length"]],
        max_new_tokens=64,
        return_dict_in_generate=True,
        output_history=True,
        **{name: case[name] for name in ("alg", "alg_temp", "steps", "eps")},
        **arguments,
    )
    assert torch.equal(output.sequences, ids)
    for row, steps in enumerate(fill_step):
        assert torch.equal(output.unmasking_step[row], torch.unique(steps, return_inverse=True)[1])
    assert len(output.history) == len(fill_step[0].unique()) == output.num_forward_passes.max()
    assert torch.equal(output.history[-1], ids)
    for earlier, later in zip(output.history, output.history[1:], strict=False):
        changed = earlier != later
        assert changed.any() and (earlier[changed] == MASK).all()


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
@pytest.mark.parametrize("arguments", [{"alg": "origin"}, {"alg": "entropy", "alg_temp": 0.5}, {"temperature": 0.8}])
def test_what_is_drawn_is_seeded(dream, prompt, arguments):
    def decode(seed, **more):
        generator = torch.Generator().manual_seed(seed)
        return dream.diffusion_generate(
            prompt, max_new_tokens=24, steps=12, generator=generator, return_dict_in_generate=True, **arguments, **more
        )

    first, again, other = decode(0), decode(0), decode(1)
    assert torch.equal(first.sequences, again.sequences) and torch.equal(first.unmasking_step, again.unmasking_step)
    assert not torch.equal(first.unmasking_step, other.unmasking_step)
    assert (first.sequences != MASK).all() and first.num_forward_passes <= 12
    torch.manual_seed(3)
    ids = dream.diffusion_generate(prompt, max_new_tokens=24, steps=12, **arguments)
    torch.manual_seed(3)
    assert torch.equal(dream.diffusion_generate(prompt, max_new_tokens=24, steps=12, **arguments), ids)


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
def test_certainty_is_measured_on_the_warped_distribution(dream, prompt):
    """As in the official code, unlike `generate`: top-p leaves several tokens with certainty 1."""
    settings = {"alg": "maskgit_plus", "max_new_tokens": 24, "steps": 24, "return_dict_in_generate": True}
    plain = dream.diffusion_generate(prompt, **settings)
    nucleus = dream.diffusion_generate(prompt, top_p=0.3, **settings)
    assert (nucleus.unmasking_confidence == 1).sum() > (plain.unmasking_confidence == 1).sum()
    logits = dream(torch.cat((prompt, torch.full((1, 24), MASK)), dim=1)).logits[:, 8:-1]
    probabilities = (logits / 0.5).softmax(dim=-1)
    one_step = dream.diffusion_generate(prompt, **(settings | {"steps": 1}), temperature=0.5, top_k=320)
    chosen = probabilities.gather(-1, one_step.sequences[:, 9:, None])[..., 0]
    torch.testing.assert_close(one_step.unmasking_confidence, chosen, atol=1e-4, rtol=0)


def test_the_old_name_is_deprecated(dream, prompt):
    with pytest.warns(FutureWarning, match=r"say `generate\(unmasking='confidence', schedule='linear_time', steps=8"):
        old = dream.diffusion_generate(prompt, alg="maskgit_plus", steps=8, max_new_tokens=16)
    new = dream.generate(
        prompt, unmasking="confidence", schedule="linear_time", steps=8, max_new_tokens=16, block_length=16,
        stop_at_eos=False,
    )  # fmt: skip
    assert torch.equal(old, new)


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alg": "greedy"}, "`alg='greedy'` is not allowed: it must be one of 'origin', 'maskgit_plus'"),
        ({"alg_temp": -1.0}, "`alg_temp=-1.0`"),
        ({"temperature": -0.1}, "`temperature=-0.1`"),
        ({"steps": 0}, "`steps=0`"),
        ({"eps": 0.0}, "`eps=0.0`"),
        ({"generation_logits_hook_func": max}, "`generation_logits_hook_func` is not supported"),
        ({"algorithm": "origin"}, "`algorithm` is not an argument"),
    ],
)
def test_wrong_arguments_of_the_old_name(dream, prompt, arguments, message, monkeypatch):
    monkeypatch.setattr(DreamModel, "forward", lambda *args, **kwargs: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        dream.diffusion_generate(prompt, max_new_tokens=8, **arguments)


def test_ancestral_schedule_has_the_numbers_of_the_linear_one_on_average():
    generator = torch.Generator().manual_seed(0)
    draws = [ancestral_schedule(40, 4, generator=generator) for _ in range(4000)]
    assert all(sum(counts) == 40 and min(counts) > 0 for counts in draws)
    first = torch.tensor([counts[0] for counts in draws], dtype=torch.float)
    share = 1 - torch.linspace(1, 1e-3, 5)[1].item()
    assert first.mean().item() == pytest.approx(40 * share, rel=0.01)
    assert first.var().item() == pytest.approx(40 * share * (1 - share), rel=0.1)  # binomial
    assert linear_time_schedule(40, 4)[0] == int(40 * share)


def test_drawn_positions_follow_the_softmax():
    score = torch.tensor([[0.9, 0.5, 0.1, 0.7]]).expand(20000, 4)
    masked = torch.tensor([[True, True, True, False]]).expand(20000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = most(score, masked, 1, 0.4, generator)
    assert (drawn.sum(dim=1) == 1).all()
    expected = (score[0, :3] / 0.4).softmax(dim=0)
    torch.testing.assert_close(drawn.float().mean(dim=0)[:3], expected, atol=0.01, rtol=0)
    pairs = most(score, masked, 2, 0.4, generator)
    assert (pairs.sum(dim=1) == 2).all() and not pairs[:, 3].any()


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"use_sliding_window": True}, {"num_attention_heads": 5}, {"num_key_value_heads": 3}],
    ids=lambda w: next(iter(w)),
)
def test_shapes_that_no_dream_has_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be a multiple|`use_sliding_window=True`"):
        DreamConfig(**(FAMILY.shape | wrong))


def test_scaled_rotary_embeddings_keep_the_official_keys(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    model = FAMILY.make(rope_theta=500.0, rope_scaling=dict(scaling))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_theta"] == 500.0 and saved["rope_scaling"] == scaling and "rope_parameters" not in saved
    ids = torch.arange(20)[None]
    torch.testing.assert_close(DreamModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_the_embedding_of_end_of_text_is_learned():
    """It is the padding token too, which torch's embedding would leave out."""
    model = FAMILY.make()
    model(torch.tensor([[1, 48, 2]])).logits.square().mean().backward()
    assert model.get_input_embeddings().weight.grad[48].abs().sum() > 0


# --- tokenizer -------------------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
TEXTS = [
    "Nora has 12 shells.\n\nShe finds 8 more; how many (in all)?",
    "def f(x):\n\treturn x ** 2  # square\n",
    "Cafe\u0301 costs 3,50 \u20ac \u2014 na\u00efve r\u00e9sum\u00e9 \u4f60\u597d \U0001f600",
    "<|im_start|>user\nWhat's 17*23?<|im_end|>\n<|im_start|>assistant\n<|mask|><|mask|><|endoftext|>",
    "   leading and trailing   ",
]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder as the official repositories are laid out, its reference tokenizer, and code that must not run."""
    folder = tmp_path_factory.mktemp("official")
    reference = Tokenizer(models.BPE())
    reference.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    reference.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    reference.model.save(str(folder))
    reference.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    added = {
        str(reference.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for token in SPECIAL
    }  # fmt: skip
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[1:],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_dream.py").write_text("raise RuntimeError('the old remote code ran')")
    (folder / "config.json").write_text((FAMILY.golden / "config.json").read_text())
    return folder, reference


@pytest.mark.parametrize("trust", [True, False, None])
def test_official_tokenizers_load(official, trust):
    folder, reference = official
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, padding_side="left")
    assert type(tokenizer) is Qwen2Tokenizer
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)
    assert tokenizer.mask_token_id == reference.token_to_id("<|mask|>")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (*SPECIAL[:1] * 2, "<|beginoftext|>")
    chat = [{"role": "user", "content": "What's 17*23?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nWhat's 17*23?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(["a", TEXTS[0]], padding=True)["attention_mask"][0][0] == 0


STOCK = """
import json, sys
from transformers import AutoTokenizer, Qwen2Tokenizer
texts = json.loads(sys.argv[2])
found = []
for load in (Qwen2Tokenizer, AutoTokenizer):
    tokenizer = load.from_pretrained(sys.argv[1])
    found.append([type(tokenizer).__name__, [tokenizer(text)["input_ids"] for text in texts]])
assert not any(name.startswith("dparallel") for name in sys.modules)
print(json.dumps(found))
"""


def test_a_saved_tokenizer_is_stock_qwen2(official, dream, tmp_path):
    folder, reference = official
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "Qwen2Tokenizer" and "auto_map" not in settings
    result = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path), json.dumps(TEXTS)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    expected = ["Qwen2Tokenizer", [reference.encode(text).ids for text in TEXTS]]
    assert json.loads(result.stdout.splitlines()[-1]) == [expected, expected]
