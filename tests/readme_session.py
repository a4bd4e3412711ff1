"""What `test_readme.py` runs in a process of its own: blocks of Python, as one session from the first to the last."""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import TrainingArguments

from dparallel.modeling import DiffusionGenerationMixin


def make_small():
    """What takes hours takes seconds: one epoch, on the CPU where there is no GPU (there transformers takes bfloat16
    only if it is told so), and answers of up to 128 tokens, as the student gives them."""
    check, generate = TrainingArguments.__post_init__, DiffusionGenerationMixin.generate

    def check_small(self):
        self.use_cpu, self.num_train_epochs = not torch.cuda.is_available(), 1
        check(self)

    def generate_little(self, *args, max_new_tokens=128, **kwargs):
        return generate(self, *args, max_new_tokens=min(max_new_tokens, 128), **kwargs)

    TrainingArguments.__post_init__, DiffusionGenerationMixin.generate = check_small, generate_little


def main(page, blocks):
    """Run `blocks`, pairs of a line's number in the page and the code that begins there, in one namespace. An error
    names the page's own line."""
    make_small()
    session = {"__name__": "__main__"}
    for line, code in blocks:
        start = time.perf_counter()
        exec(compile("\n" * (line - 1) + code, page, "exec"), session)
        print(f"{page}:{line}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(*json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
