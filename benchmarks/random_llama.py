"""Makes a Llama with random weights, and a tokenizer with a ChatML template, from a file of conversations.

    python benchmarks/random_llama.py --rows rows.jsonl --out DIR [--vocab_size 4096] [--hidden_size 256] ...

Needs the `parity` extra: transformers' own class writes the folder, so that jdpo has no part in it. `rows.jsonl`
holds one conversational preference per line (`prompt`, `chosen`, `rejected`, each a list of messages).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A template whose text of a prompt is always a prefix of its text of prompt and answer."""


def main() -> None:
    """Writes the folder that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of conversational preferences")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--num_heads", type=int, default=8)
    parser.add_argument("--num_kv_heads", type=int, default=4)
    parser.add_argument("--init_std", type=float, default=0.05, help="of every matrix")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the stored weights")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with arguments.rows.open(encoding="utf-8") as lines:
        texts = [message["content"] for line in lines for messages in json.loads(line).values() for message in messages]
    tokenizer = train_tokenizer(texts, arguments.vocab_size)
    tokenizer.save_pretrained(arguments.out)
    model = random_llama(tokenizer, arguments)
    model.save_pretrained(arguments.out)
    print(f"{arguments.out}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """Trains a byte-level BPE tokenizer of at most `vocab_size` entries that ends turns with `<|im_end|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def random_llama(tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """Makes a Llama with random parameters, norm scales included: scales of 1 would hide a wrong order."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 11 // 4,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        num_key_value_heads=arguments.num_kv_heads,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = (1.0, 0.1) if "norm" in name else (0.0, arguments.init_std)
            parameter.normal_(mean, std, generator=generator)
    return model.to(getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
