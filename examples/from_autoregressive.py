"""Make a block-causal diffusion model of an autoregressive checkpoint (Llama, Qwen2 or Qwen3), to be fine-tuned.

The result has the weights, the tokenizer and the chat template of the checkpoint. It decodes blocks of
`--block_length` tokens, which `MaskedDiffusionTrainer` still has to teach it. To read a GGUF file, whose weights are
unpacked, install the package `gguf`.

    python examples/from_autoregressive.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir runs/smollm2
    python examples/from_autoregressive.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf --output_dir runs/smollm2
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.trainer import from_autoregressive


def load(model: str, dtype: str):
    """A model and its tokenizer, by Hub id, folder or GGUF file."""
    path = Path(model)
    if path.suffix != ".gguf":
        where, settings = model, {}
    elif path.is_file():
        where, settings = str(path.parent), {"gguf_file": path.name}
    else:
        raise ValueError(f"`--model {model}` is not allowed: there is no such file.")
    tokenizer = AutoTokenizer.from_pretrained(where, **settings)
    return AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **settings), tokenizer


def main():
    parser = CommandParser(__doc__)
    parser.add_argument("--model", required=True, help="Hub id, folder or .gguf file of an autoregressive model")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the new model and its tokenizer")
    parser.add_argument("--block_length", type=int, default=32, help="tokens of a block, which see each other")
    parser.add_argument(
        "--mask_token",
        help="special or new token that is to be [MASK] (default: the tokenizer's own, an unused or a new one)",
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: auto (as saved), float32, bfloat16 or float16"
    )
    arguments = parser.parse_args()
    with plain_errors(ValueError, OSError, ImportError):
        model, tokenizer = load(arguments.model, arguments.dtype)
        model, tokenizer = from_autoregressive(model, tokenizer, arguments.block_length, arguments.mask_token)
        model.save_pretrained(arguments.output_dir)
        tokenizer.save_pretrained(arguments.output_dir)
    kind, mask = type(model).__name__, f"{tokenizer.mask_token!r}, id {tokenizer.mask_token_id}"
    print(
        f"In {arguments.output_dir}: a {kind} with blocks of {arguments.block_length} tokens, [MASK] is {mask}. Next, "
        f"fine-tune it: accelerate launch examples/fine_tune.py --model {arguments.output_dir} --dtype float32 "
        f"--dataset_name rows.jsonl --output_dir {arguments.output_dir}-tuned"
    )


if __name__ == "__main__":
    main()
