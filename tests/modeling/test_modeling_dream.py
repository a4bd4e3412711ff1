"""Dream's own: padded logits and original decoding of the published code, its configuration and its tokenizer."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, Qwen2Tokenizer
from transformers.generation import LogitsProcessor
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from dparallel.modeling import DreamConfig, DreamModel
from dparallel.modeling.unmasking import ancestral_schedule, linear_time_schedule, most
from tests.families import FAMILIES
from tests.golden import load_cases

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
@pytest.mark.parametrize(
    "arguments",
    [
        {"alg": "origin"},
        {"alg": "entropy", "alg_temp": 0.5},
        {"alg": "topk_margin", "alg_temp": 0.5},
        {"alg": "maskgit_plus", "temperature": 0.8},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_what_is_drawn_is_seeded(dream, prompt, arguments):
    def decode(seed):
        return dream.diffusion_generate(
            prompt, max_new_tokens=24, steps=12, generator=torch.Generator().manual_seed(seed), **arguments
        )

    assert torch.equal(decode(0), decode(0))
    assert len({tuple(decode(seed)[0].tolist()) for seed in range(3)}) == 3
    torch.manual_seed(3)
    ids = dream.diffusion_generate(prompt, max_new_tokens=24, steps=12, **arguments)
    torch.manual_seed(3)
    assert torch.equal(dream.diffusion_generate(prompt, max_new_tokens=24, steps=12, **arguments), ids)
    assert (ids != MASK).all()


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
def test_what_a_checkpoint_saved_for_generate_is_left_out(dream, prompt, monkeypatch):
    arguments = {"alg": "entropy", "steps": 6, "max_new_tokens": 24}
    expected = dream.diffusion_generate(prompt, **arguments)
    saved = {"unmasking": "entropy_threshold", "threshold": 0.5, "block_cache": "dual", "cache_refresh_interval": 3}
    for name, value in (saved | {"eos_threshold": 0.9}).items():
        monkeypatch.setattr(dream.generation_config, name, value)
    assert torch.equal(dream.diffusion_generate(prompt, **arguments), expected)
    cached = dream.diffusion_generate(prompt, **arguments, block_cache="dual", cache_refresh_interval=1)
    assert torch.equal(cached, expected)  # and 1 is exact


def warped(logits, temperature, top_p, top_k):
    """What the official code draws from and measures certainty on, without [MASK] where something is cut off."""
    logits = logits / temperature if temperature else logits.clone()
    if top_p is not None or top_k is not None:
        logits[:, MASK] = -torch.inf
    if top_p is not None:
        probs, order = logits.softmax(dim=-1).sort(descending=True, dim=-1)
        cut = probs.cumsum(dim=-1) - probs > top_p
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -torch.inf)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
    return logits.softmax(dim=-1)


@torch.no_grad()
def slow_original(model, prompt, length, alg, steps, eps, top_p, top_k):
    """The official loop at temperature 0, for one prompt."""
    canvas = torch.cat((prompt, torch.full((1, length), MASK)), dim=1)
    times = torch.linspace(1, eps, steps + 1)
    for i in range(steps):
        masked = (canvas[0] == MASK).nonzero()[:, 0]
        share = 1 - times[i + 1] / times[i] if i < steps - 1 else 1
        count = int(len(masked) * share)
        probs = warped(model(canvas).logits[0, masked - 1], 0, top_p, top_k)
        top = probs.topk(2, dim=-1)[0]
        score = {
            "maskgit_plus": top[:, 0],
            "topk_margin": top[:, 0] - top[:, 1],
            "entropy": torch.xlogy(probs, probs).sum(dim=-1),
        }[alg]
        chosen = score.argsort(descending=True, stable=True)[:count]  # the official topk leaves ties open
        canvas[0, masked[chosen]] = probs[chosen].argmax(dim=-1)
    return canvas


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize(
    "settings", [{"eps": 0.1}, {"top_k": 40}, {"top_p": 0.97}, {"top_p": 0.98, "top_k": 60}], ids=str
)
def test_greedy_decoding_equals_the_slow_loop(dream, alg, settings):
    for seed in range(3):
        prompt = torch.randint(0, 317, (1, 4 + 3 * seed), generator=torch.Generator().manual_seed(seed))
        settings = {"eps": 1e-3, "top_p": None, "top_k": None, **settings}
        output = dream.diffusion_generate(prompt, alg=alg, steps=11, max_new_tokens=20, **settings)
        assert torch.equal(output, slow_original(dream, prompt, 20, alg, 11, **settings))


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
@torch.no_grad()
def test_drawn_tokens_have_the_warped_distribution(dream, prompt):
    """One pass, 3,000 times: frequencies of the first token, and its probability as the certainty."""
    output = dream.diffusion_generate(
        prompt.repeat(3000, 1), alg="maskgit_plus", steps=1, max_new_tokens=2, temperature=1.5, top_p=0.9, top_k=30,
        return_dict_in_generate=True, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    canvas = torch.cat((prompt, torch.full((1, 2), MASK)), dim=1)
    expected = warped(dream(canvas).logits[0, 8:9], 1.5, 0.9, 30)[0]
    drawn = output.sequences[:, 9]
    frequencies = torch.bincount(drawn, minlength=320) / 3000
    assert expected.max() < 0.9 and (frequencies > 0).sum() > 3
    torch.testing.assert_close(frequencies, expected, atol=0.035, rtol=0)
    torch.testing.assert_close(output.unmasking_confidence[:, 0], expected[drawn], atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
def test_origin_writes_each_position_with_its_probability(dream, prompt):
    """On average a third in the first of three steps, and not always as many."""
    counts = [
        (dream.diffusion_generate(
            prompt, steps=3, max_new_tokens=30, return_dict_in_generate=True,
            generator=torch.Generator().manual_seed(seed),
        ).unmasking_step == 0).sum().item()
        for seed in range(60)
    ]  # fmt: skip
    assert sum(counts) / 60 == pytest.approx(10, abs=1.2) and len(set(counts)) > 4


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 1}, {"top_p": 0.5, "temperature": 0.3}], ids=str)
def test_a_nucleus_of_nothing_but_mask(prompt, settings):
    model = FAMILY.load()
    head = model.get_output_embeddings().weight.data
    head *= 0.01
    head[MASK] = 1
    model.get_submodule(FAMILY.norm).register_forward_hook(lambda module, args, out: out + 1)
    ids = model.diffusion_generate(prompt, alg="entropy", max_new_tokens=8, **settings)[0, 9:]
    assert (ids != MASK).all() and len(ids.unique()) > 1


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
def test_settings_come_from_arguments_then_configuration_then_checkpoint(tmp_path, prompt):
    """A generation_config.json as the official class saves it; `generate` does not go by it."""
    FAMILY.load().save_pretrained(tmp_path)
    official = {"alg": "entropy", "alg_temp": 0.0, "eps": 0.001, "steps": 8, "temperature": 0.0, "top_p": None}
    official |= {"eos_token_id": 318, "pad_token_id": 318, "top_k": None, "output_history": True, "max_new_tokens": 16}
    (tmp_path / "generation_config.json").write_text(json.dumps(official | {"return_dict_in_generate": True}))
    model = DreamModel.from_pretrained(tmp_path)
    expected = FAMILY.load().diffusion_generate(prompt, alg="entropy", steps=8, max_new_tokens=16)
    output = model.diffusion_generate(prompt)
    assert torch.equal(output.sequences, expected) and len(output.history) == 8
    config = GenerationConfig(alg="maskgit_plus", steps=5)
    output = model.diffusion_generate(prompt, config)
    assert (
        output.num_forward_passes.item() == 5 != model.diffusion_generate(prompt, config, steps=4).num_forward_passes
    )
    by_confidence = FAMILY.load().diffusion_generate(prompt, alg="maskgit_plus", steps=5, max_new_tokens=16)
    assert torch.equal(output.sequences, by_confidence)
    plain = model.generate(prompt)
    assert torch.equal(plain, FAMILY.load().generate(prompt, max_new_tokens=16))
    assert model.generate(prompt, do_sample=True).shape == plain.shape
    model.save_pretrained(tmp_path / "again")
    assert len(DreamModel.from_pretrained(tmp_path / "again").diffusion_generate(prompt).history) == 8


@pytest.mark.filterwarnings("ignore:`diffusion_generate` is deprecated")
def test_logits_processors_and_the_whole_answer(dream, prompt):
    """A user's processor is used; end-of-text ends nothing; without `output_history` there is no history."""

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.where(torch.arange(320) % 7 == 3, scores, -torch.inf)

    settings = {"alg": "entropy", "steps": 6, "max_new_tokens": 12, "return_dict_in_generate": True}
    output = dream.diffusion_generate(prompt, logits_processor=[Only()], **settings)
    assert (output.sequences[:, 9:] % 7 == 3).all() and output.history is None
    token = output.sequences[0, 11].item()
    again = dream.diffusion_generate(prompt, logits_processor=[Only()], eos_token_id=token, **settings)
    assert torch.equal(again.sequences, output.sequences)
    cut = dream.diffusion_generate(prompt, max_time=0.0, output_history=True, **settings)
    written = cut.unmasking_step[0] == 0
    assert len(cut.history) == 1 and (cut.history[0][0, 9:][~written] == MASK).all() and not written.all()


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
        ({"temperature": "hot"}, "`temperature='hot'`"),
        ({"top_p": 1.5}, "`top_p=1.5`"),
        ({"top_k": 0}, "top_k"),
        ({"block_length": 8}, r"\['block_length'\] are settled by `alg` here"),
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
    drawn = most(score, masked, 1, 0.4, torch.rand(score.shape, generator=generator))
    assert (drawn.sum(dim=1) == 1).all()
    expected = (score[0, :3] / 0.4).softmax(dim=0)
    torch.testing.assert_close(drawn.float().mean(dim=0)[:3], expected, atol=0.01, rtol=0)
    pairs = most(score, masked, 2, 0.4, torch.rand(score.shape, generator=generator))
    assert (pairs.sum(dim=1) == 2).all() and not pairs[:, 3].any()


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"use_sliding_window": True},
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 3},
    ],
    ids=lambda w: next(iter(w)),
)
def test_shapes_that_no_dream_has_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"must be a multiple|`{next(iter(wrong))}=.*is not supported"):
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
    """It is the padding token too, which torch's embedding would leave out and start at zero."""
    model = FAMILY.make()
    embedding = model.get_input_embeddings()
    model(torch.tensor([[1, 48, 2]])).logits.square().mean().backward()
    assert embedding.weight.grad[48].abs().sum() > 0 and embedding.weight[48].abs().sum() > 0
    assert model.config.pad_token_id == 48
    assert DreamModel(DreamConfig(**(FAMILY.shape | {"pad_token_id": 1000}))).config.pad_token_id == 1000


@torch.no_grad()
@pytest.mark.parametrize(
    "cast", [lambda model: model.bfloat16(), lambda model: model.to("meta").to_empty(device="cpu")]
)
def test_rotary_frequencies_stay_exact(cast, tmp_path):
    """Rounded to bfloat16 they would misplace far positions."""
    model = FAMILY.make(hidden_size=256, num_attention_heads=2, num_key_value_heads=1)
    exact = model.model.rotary_emb.inv_freq.clone()
    model = cast(model)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32 == model.model.rotary_emb.original_inv_freq.dtype
    if model.dtype == torch.bfloat16:
        assert torch.equal(model.model.rotary_emb.inv_freq, exact)
        model.save_pretrained(tmp_path)
        ids = torch.randint(0, 48, (1, 500), generator=torch.Generator().manual_seed(0))
        loaded = DreamModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_published_base_of_the_rotary_embedding_is_the_default():
    assert DreamConfig().rope_parameters["rope_theta"] == 1e6 and DreamConfig().to_dict()["rope_theta"] == 1e6


def test_no_cache_is_made_unasked(dream, prompt):
    assert dream(prompt, use_cache=True).past_key_values is None


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
from transformers import AutoTokenizer, GenerationConfig, Qwen2Tokenizer
from transformers.generation import LogitsProcessor
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
