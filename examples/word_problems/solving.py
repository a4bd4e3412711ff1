"""Decode word problems with a model and count what it took."""

import time
from dataclasses import dataclass

import torch
from problems import is_correct
from tqdm.auto import tqdm

from dparallel.hub_cards.measurements import wilson_interval
from dparallel.modeling import LLaDAModelLM

ANSWER_LENGTH = 128  # tokens, end-of-text padding included


def load_model(path):
    """A model of this folder's kind for decoding: on a GPU in bfloat16, if there is one."""
    is_gpu = torch.cuda.is_available()
    model = LLaDAModelLM.from_pretrained(path, dtype=torch.bfloat16 if is_gpu else torch.float32)
    return model.to("cuda" if is_gpu else "cpu").eval()


@dataclass
class Result:
    """Of one way of decoding, over N problems. NFE is a mean over problems; TPF is all tokens, up to and including the
    end-of-text of each answer, over all passes."""

    name: str
    settings: dict
    correct: list[bool]
    nfe: float
    tpf: float
    seconds: float

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy."""
        return wilson_interval(self.accuracy, len(self.correct))


def evaluate(model, tokenizer, problems, name, batch_size=16, **settings) -> Result:
    """Solve `problems` in batches with `model.generate(**settings)`.

    `max_new_tokens` is 128 unless given. Problems of similar length share a batch, so that little is padded; results
    do not depend on it.
    """
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], add_generation_prompt=True, tokenize=False
        )
        for problem in problems
    ]
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))
    correct, passes, tokens = [False] * len(problems), 0, 0
    start = time.perf_counter()
    batches = range(0, len(order), batch_size)
    for first in tqdm(batches, desc=name, leave=False):
        rows = order[first : first + batch_size]
        batch = tokenizer([prompts[i] for i in rows], add_special_tokens=False, padding=True, return_tensors="pt")
        output = model.generate(
            **batch.to(model.device), return_dict_in_generate=True, **{"max_new_tokens": ANSWER_LENGTH, **settings}
        )
        lengths = output.num_tokens.tolist()
        answers = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
        answers = [answer[:length] for answer, length in zip(answers, lengths, strict=True)]
        for i, text in zip(rows, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            correct[i] = is_correct(text, problems[i].answer)
        passes += output.num_forward_passes.sum().item()
        tokens += sum(lengths)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return Result(name, settings, correct, passes / len(problems), tokens / passes, time.perf_counter() - start)
