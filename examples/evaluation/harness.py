"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) with our models: its generation tasks,
in batches, with any policy.

All arguments are the harness's own, which `run --help` lists; `--model_args` also takes what `generate()` takes.
Answers have the length that the task or `--gen_kwargs` says, or else the checkpoint's own `max_new_tokens`, and
without one the harness's 256. An adapter (`pretrained=` or `peft=`) decodes by what it was distilled for. The results
have `nfe` and `tpf` of each task under `config`: of the requests that the first process decoded, so not of those that
it found in the harness's cache. `--output_path` says where they go.

    python -m dparallel.evaluation.harness --model dparallel --tasks gsm8k_cot_zeroshot --apply_chat_template \\
        --model_args pretrained=Dream-org/Dream-v0-Instruct-7B,unmasking=entropy_threshold,threshold=0.45 \\
        --gen_kwargs max_gen_toks=256 --batch_size 16
"""

import logging
import re
import sys
from typing import Any, NoReturn

from lm_eval.api.instance import Instance
from transformers import PreTrainedModel

try:
    import lm_eval.models  # noqa: F401  (its own models are registered first)
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    message = "lm-evaluation-harness is not installed: `pip install lm_eval`, or the extra `lm-eval` of this package."
    if __name__ == "__main__":
        sys.exit(message)
    raise ModuleNotFoundError(message, name="lm_eval") from error
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import dparallel.modeling  # noqa: F401  (registers the model families with AutoModelForCausalLM)
from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.hub_cards.hub_ids import check_folder_or_hub_id
from dparallel.hub_cards.merge import decode_as_distilled

from .command_line import is_adapter
from .evaluation import DECODING_ARGUMENTS, check_decoding, resolve_decoding
from .metrics import DecodingEfficiency

logger = logging.getLogger("lm_eval")  # its own, which writes to the terminal
LIKELIHOODS = (
    "{task!r} compares likelihoods, which a masked diffusion model does not have from left to right (its bound takes "
    "many passes over random masks): choose a task that generates."
)


@register_model("dparallel")
class DiffusionLM(HFLM):
    """The harness's Hugging Face model, decoding by `generate(**decoding)`; see `HFLM` for the other arguments.

    Args:
        pretrained (`str` or `PreTrainedModel`).
        unmasking, threshold, steps, ...: arguments of `generate()`; what is not given is as the checkpoint has it.
    """

    def __init__(self, pretrained: str | PreTrainedModel | None = None, **arguments: Any):
        if pretrained is None:
            raise ValueError("`pretrained=None` is not allowed: name a model, `--model_args pretrained=user/repo`.")
        if isinstance(pretrained, str):
            check_folder_or_hub_id("pretrained", pretrained)
        self.decoding = {name: arguments.pop(name) for name in DECODING_ARGUMENTS if name in arguments}
        self.efficiency, self._counts = {}, []
        try:
            super().__init__(pretrained, backend="causal", **arguments)
        except TypeError as error:  # what nobody knows goes to the model
            name = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if name is None or name[1] not in arguments:
                raise
            raise ValueError(
                f"`{name[1]}={arguments[name[1]]!r}` is not allowed: it must be an argument of lm-eval's HFLM or one "
                f"of {', '.join(DECODING_ARGUMENTS)}."
            ) from error
        adapter = arguments.get("peft") or (pretrained if is_adapter(pretrained, arguments.get("revision")) else None)
        if adapter:
            decode_as_distilled(self.model, adapter)
        check_decoding(self.model, self.decoding)

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where neither the task nor `--gen_kwargs` says how many: the checkpoint's own number."""
        return self.model.generation_config.max_new_tokens or super().max_gen_toks

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = {}
        for task in dict.fromkeys(request.task_name for request in requests):  # each with counts of its own
            self._counts = []
            numbers = [i for i, request in enumerate(requests) if request.task_name == task]
            answers |= zip(numbers, super().generate_until([requests[i] for i in numbers], disable_tqdm), strict=True)
            passes, tokens = zip(*self._counts, strict=True)
            self.efficiency[task] = found = DecodingEfficiency().compute(num_forward_passes=passes, num_tokens=tokens)
            if self.rank == 0:
                words = f"{found['nfe']:.1f} forward passes per answer, {found['tpf']:.2f} tokens per pass"
                logger.info(f"{task}: {words} ({len(passes)} answers of the first process)")
        return [answers[i] for i in range(len(requests))]

    def _model_generate(self, context, max_length, stop, **kwargs):
        kwargs |= {**self.decoding, "return_dict_in_generate": True}
        output = super()._model_generate(context, max_length, stop, **kwargs)
        self._counts += zip(output.num_forward_passes.tolist(), output.num_tokens.tolist(), strict=True)
        return output.sequences

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> NoReturn:
        raise NotImplementedError(LIKELIHOODS.format(task=requests[0].task_name))

    loglikelihood_rolling = loglikelihood

    def get_model_info(self) -> dict[str, Any]:
        found = {name: {task: each[name] for task, each in self.efficiency.items()} for name in ("nfe", "tpf")}
        return super().get_model_info() | found | {"decoding": self.decoding, "resolved_decoding": self._resolved()}

    def _resolved(self):
        found = resolve_decoding(self.model, self.decoding)
        del found["max_new_tokens"]  # each task has its own
        return found


def main():
    if sys.argv[1:] in (["-h"], ["--help"]):
        CommandParser(__doc__, prog="python -m dparallel.evaluation.harness", usage="%(prog)s [OPTIONS]").parse_args()
    with plain_errors(ValueError, OSError, NotImplementedError):
        cli_evaluate()


if __name__ == "__main__":
    main()
