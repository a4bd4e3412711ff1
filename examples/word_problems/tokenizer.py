"""The tokenizer of the word problems: every word of the generator is one token and every digit stands alone.

Digits stand alone because a small model learns to add digit by digit far sooner than it learns a table of numbers.
The bytes are part of the vocabulary, so any other text is also encoded and decoded without loss.

    python examples/word_problems/tokenizer.py --output runs/tokenizer
"""

from problems import PIECE_PATTERN, generate_problems
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dparallel.hub_cards.command_line import CommandParser

MAX_VOCABULARY = 768
NUM_SAMPLES = 4000
SAMPLE_SEED = 0  # with NUM_SAMPLES it decides the ids of all tokens: a trained model depends on both

END, MASK, START, USER, ASSISTANT = "<|endoftext|>", "<|mask|>", "<|startoftext|>", "<|user|>", "<|assistant|>"

# No end-of-text after the answer: the trainer adds it, and would otherwise add a second one.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[END, MASK, START, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = generate_problems("train", NUM_SAMPLES, SAMPLE_SEED)
    tokenizer.train_from_iterator((text for problem in samples for text in problem[:2]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        mask_token=MASK,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--output", required=True, help="folder to save the tokenizer in")
    arguments = parser.parse_args()
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(arguments.output)
    print(
        f"In {arguments.output}: a tokenizer of {len(tokenizer)} tokens. Next, to train a model that has it: "
        "python examples/word_problems/train.py"
    )


if __name__ == "__main__":
    main()
