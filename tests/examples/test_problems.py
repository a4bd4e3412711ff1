"""The word problems of the example and their tokenizer."""

import hashlib
import random
import re
from itertools import chain

import pytest
from transformers import AutoTokenizer

from tests.scripts import call, load

generator, tokenization = load("word_problems/problems.py"), load("word_problems/tokenizer.py")
extract_answer, is_correct, generate_problems = (
    generator.extract_answer, generator.is_correct, generator.generate_problems,
)  # fmt: skip
split_of, to_conversation = generator.split_of, generator.to_conversation
build_tokenizer = tokenization.build_tokenizer

SUM = re.compile(r"([0-9]+) ([-+*/]) ([0-9]+) = ([0-9]+)")
NUMBER = re.compile("[0-9]+|doubles|triples")


def sums_of(problem):
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in SUM.findall(problem.solution)]


def content_of(problem):
    return "; ".join(f"{a} {sign} {b} = {c}" for a, sign, b, c in sums_of(problem))


@pytest.fixture(scope="module")
def train():
    return list(generate_problems("train", 20_000, seed=3))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_held_out_problems_are_frozen():
    held_out = list(generate_problems("test", 50, generator.TEST_SEED))
    assert generator.NUM_TEST_PROBLEMS == 5000
    assert held_out[0].answer == 20
    digest = hashlib.sha256(repr([tuple(problem) for problem in held_out]).encode()).hexdigest()
    assert digest == "efec01b4baedb524debab3194999e17c61797bc0f48a67265c0ec2f25b4b49da"


@pytest.mark.parametrize("split", generator.SPLITS)
def test_same_seed_same_problems(split):
    problems = list(generate_problems(split, 40, seed=1))
    assert len(problems) == 40
    assert problems[:20] == list(generate_problems(split, 20, seed=1))
    assert problems != list(generate_problems(split, 40, seed=2))


def test_splits_share_no_content(train):
    contents = {"train": {content_of(problem) for problem in train}}
    for split in ("validation", "test"):
        drawn = [content_of(problem) for seed in (3, 4) for problem in generate_problems(split, 500, seed)]
        assert len(set(drawn[:500])) == 500
        contents[split] = set(drawn)
    # The hash alone decides, whatever the seed: this is more than three samples that happen not to meet.
    for split, drawn in contents.items():
        assert {split_of(content) for content in drawn} == {split}


def test_content_that_comes_again_is_drawn_again_outside_train(monkeypatch):
    few = [generator._draw_steps(random.Random(seed)) for seed in range(3)]
    monkeypatch.setattr(generator, "_draw_steps", lambda rng: few[int(rng.random() * 3)])
    monkeypatch.setattr(generator, "split_of", lambda content: "test")
    assert len({content_of(problem) for problem in generate_problems("test", 3, seed=0)}) == 3
    monkeypatch.setattr(generator, "split_of", lambda content: "train")
    assert len(list(generate_problems("train", 9, seed=0))) == 9


def test_unknown_split():
    with pytest.raises(ValueError, match="split is 'dev', but must be one of 'train', 'validation', 'test'"):
        generate_problems("dev", 1, seed=0)


def test_every_sum_is_true_and_asked_for(train):
    signs = set()
    for problem in train:
        said = [{"doubles": 2, "triples": 3}.get(word) or int(word) for word in NUMBER.findall(problem.question)]
        sums = sums_of(problem)
        assert problem.solution.count("=") == len(sums)
        total = said[0]
        used = [total]
        in_boxes = None
        for (a, sign, b, c), following in zip(sums, [*sums[1:], None], strict=True):
            assert c == {"+": a + b, "-": a - b, "*": a * b, "/": b and a / b}[sign]
            assert 0 <= c <= 999
            signs.add(sign)
            if following and sign == "*" and following[:3] == (total, "+", c):
                in_boxes = c
                used += [a, b]
                continue
            assert a == total
            used += [b] if in_boxes is None else []
            in_boxes = None
            total = c
        assert used == said
        assert total == problem.answer == extract_answer(problem.solution)
        assert is_correct(problem.solution, problem.answer)
        assert not is_correct(problem.solution, problem.answer + 1)
        assert problem.solution.endswith(f" The answer is {problem.answer}.")
    assert signs == set("+-*/")


@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_one_content_is_worded_in_many_ways(num_steps):
    rng = random.Random(0)
    steps = next(steps for steps in iter(lambda: generator._draw_steps(rng), None) if len(steps) == num_steps)
    solutions = [generator._word_problem(rng, steps).solution for _ in range(500)]
    assert {tuple(SUM.findall(solution)) for solution in solutions} == {tuple(SUM.findall(solutions[0]))}
    assert len(set(solutions)) > 250
    # The last sum stands in many places: how the tokens line up is not known before the words are.
    assert len({len(solution.split()) for solution in solutions}) >= 20
    assert len({len(solution[: solution.rindex("=")].split()) for solution in solutions}) >= 20


@pytest.mark.parametrize("sign", ["+", "-", "*", "/", "boxes"])
def test_paraphrases_of_a_step_differ_in_length(sign):
    lengths = [len(text.split()) for row in generator.SOLUTION_STEP[sign] for text in row]
    assert len(lengths) == len(set(lengths)) == 5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("3 + 4 = 7.", None),
        ("The answer is", None),
        ("The answer is 7", None),
        ("The answer is seven.", None),
        ("The answer is 7.5.", None),
        ("The answer is 12,34.", None),
        ("The answer is " + "9" * 5000 + ".", None),
        ("The answer is 7.", 7),
        ("The answer is 7. No. The answer is 8. That is all.", 8),
        ("The answer is -7.", -7),
        ("The answer is 1,234,567.", 1_234_567),
        ("The answer is 0.<|endoftext|>", 0),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_conversation():
    problem = generator.Problem("Why?", "The answer is 1.", 1)
    assert to_conversation(problem) == {
        "prompt": [{"role": "user", "content": "Why?"}],
        "completion": [{"role": "assistant", "content": "The answer is 1."}],
    }


def test_special_tokens(tokenizer):
    assert len(tokenizer) <= tokenization.MAX_VOCABULARY
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.bos_token == "<|startoftext|>"
    assert tokenizer.mask_token == "<|mask|>"
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    for name in ("endoftext", "startoftext", "mask", "user", "assistant"):
        assert len(tokenizer(f"<|{name}|>").input_ids) == 1


def test_every_word_is_one_token(tokenizer, train):
    texts = sorted(set(chain.from_iterable(problem[:2] for problem in train)))
    pieces = {piece for text in texts for piece in re.findall(generator.PIECE_PATTERN, text)}
    assert len(pieces) > 150
    assert {piece for piece in pieces if len(tokenizer(piece).input_ids) > 1} == set()


def test_digits_stand_alone(tokenizer):
    text = "1234567890 12 + 345 = 6, 78x90"
    tokens = [tokenizer.decode([token]) for token in tokenizer(text).input_ids]
    assert "".join(tokens) == text
    assert [token for token in tokens if re.search("[0-9]", token) and not re.fullmatch(" ?[0-9]", token)] == []
    assert not any(re.search("[0-9].|[^ ][0-9]", tokenizer.decode([token])) for token in range(len(tokenizer)))


def test_lengths(tokenizer, train):
    prompts = tokenizer.apply_chat_template(
        [to_conversation(problem)["prompt"] for problem in train], add_generation_prompt=True
    )["input_ids"]
    solutions = tokenizer([problem.solution for problem in train])["input_ids"]
    assert max(map(len, prompts)) <= 128
    assert max(map(len, solutions)) <= 127  # and one more for the end-of-text
    assert 35 <= sum(map(len, prompts)) / len(prompts) <= 45
    assert 60 <= sum(map(len, solutions)) / len(solutions) <= 75


def test_longest_possible_prompt_fits():
    def longest(table, b=99):
        texts = [text.format(n="Nora", o="stars", a=99, b=b, m=19).strip() for text in chain(*table)]
        return max(len(re.findall(generator.PIECE_PATTERN, text)) for text in texts)

    steps = [longest(table, 99 if kind in "+-" else 5) for kind, table in generator.QUESTION_STEP.items()]
    chat = 3
    assert longest(generator.QUESTION_START) + 4 * max(steps) + longest(generator.QUESTION_END) + chat <= 128


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "line\nbreak\r\n\ttab",
        "Ünïcödé ß",
        "数学 は 楽しい",
        "🙂👩‍👧 ok",
        "x_1=2.50€",
        "\x00\x7f",
        "don't , stop !",
    ],
)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_generated_text_survives(tokenizer, train):
    texts = [text for problem in train[:200] for text in problem[:2]]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


def test_chat_template(tokenizer):
    conversation = to_conversation(generator.Problem("Why?", "So.", 0))
    prompt = tokenizer.apply_chat_template(conversation["prompt"], add_generation_prompt=True, tokenize=False)
    both = conversation["prompt"] + conversation["completion"]
    assert prompt == "<|startoftext|><|user|>Why?<|assistant|>"
    assert tokenizer.apply_chat_template(both, tokenize=False) == prompt + "So."
    # The trainer encodes prompt and answer together and cuts the prompt off the front.
    ids = tokenizer.apply_chat_template(both)["input_ids"]
    assert ids == tokenizer(prompt).input_ids + tokenizer("So.").input_ids


def test_tokenizer_is_the_same_every_time(tokenizer):
    assert build_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_script_saves_what_auto_tokenizer_loads(tokenizer, train, tmp_path):
    script = call("word_problems/tokenizer.py", "--output", tmp_path)
    assert script.returncode == 0 and f"{len(tokenizer)} tokens" in script.stdout
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for problem in train[:50] for text in problem[:2]] + ["ß 12\n <|mask|>"]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert loaded.batch_decode(loaded(texts)["input_ids"]) == texts
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert (loaded.pad_token_id, loaded.mask_token_id) == (tokenizer.pad_token_id, tokenizer.mask_token_id)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.padding_side == "left"
    assert loaded.model_input_names == ["input_ids", "attention_mask"]
