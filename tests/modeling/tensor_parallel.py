"""What `test_tensor_parallel.py` launches in two processes: models in parts, beside whole ones."""

import json
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests.families import ALL_FAMILIES


def compare(family, folder, tie_word_embeddings):
    whole = family.small(tie_word_embeddings=tie_word_embeddings, num_hidden_layers=2).eval()
    if distributed.get_rank() == 0:
        whole.save_pretrained(folder)
    distributed.barrier()
    parts = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").eval()
    ids = torch.randint(2, 590, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [model(ids).logits for model in (whole, parts)]
    answers = [model.generate(ids, max_new_tokens=16, pad_token_id=0) for model in (whole, parts)]
    return {
        "parts": sum(isinstance(parameter, DTensor) for parameter in parts.parameters()),
        "difference": (logits[0] - logits[1]).abs().max().item(),
        "same_tokens": torch.equal(*answers),
    }


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    target = Path(sys.argv[1])
    found = {
        f"{name}, {'tied' if tied else 'untied'}": compare(family, target / f"{name}-{tied}", tied)
        for name, family in ALL_FAMILIES.items()
        for tied in (False, True)
    }
    (target / f"process-{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()
