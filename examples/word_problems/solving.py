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
    """Solve `problems`, `batch_size` at a time, with `model.generate_batch(**settings)`.

    `max_new_tokens` is 128 unless given.
    """
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for problem in problems
    ]
    correct, passes, tokens = [False] * len(problems), 0, 0
    start = time.perf_counter()
    outputs = model.generate_each(prompts, max_batch_size=batch_size, **{"max_new_tokens": ANSWER_LENGTH, **settings})
    for output in tqdm(outputs, total=len(prompts), desc=name, leave=False):
        answer = tokenizer.decode(output.generated_tokens[: output.num_tokens], skip_special_tokens=True)
        correct[output.index] = is_correct(answer, problems[output.index].answer)
        passes += output.num_forward_passes
        tokens += output.num_tokens
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return Result(name, settings, correct, passes / len(problems), tokens / passes, time.perf_counter() - start)
