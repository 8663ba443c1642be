"""transformers' half of generation.py: answers requests on standard input, one JSON object per line.

    python benchmarks/generation_transformers.py < requests.jsonl

Runs in a process of its own, so that it may have another Python, and imports nothing of jdpo.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

transformers.logging.set_verbosity_error()


def main() -> None:
    """Says that it is ready, then answers every line."""
    torch.set_num_threads(int(sys.argv[1]))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    print(json.dumps(versions), flush=True)
    models: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        folder = request["folder"]
        if folder not in models:
            models[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        print(json.dumps(answer(models[folder], **request)), flush=True)


@torch.inference_mode()
def answer(
    model: Any,
    *,
    folder: str,
    prompts: list[list[int]],
    num_samples: int,
    prompts_per_batch: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    end_token_ids: list[int],
    seed: int,
) -> dict[str, Any]:
    """Generates answers; returns the seconds that it took, and the tokens of each answer with the one that ends it."""
    del folder
    torch.manual_seed(seed)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_samples,
        # Nothing ends an answer before its length where there is no end token, whatever the model's own settings say.
        eos_token_id=end_token_ids or None,
        pad_token_id=0,
        **(drawn if temperature else {"do_sample": False}),
    )
    model.generation_config = GenerationConfig(pad_token_id=0)
    answers = []
    started, cpu_started = time.perf_counter(), time.process_time()
    for start in range(0, len(prompts), prompts_per_batch):
        tokens = torch.tensor(prompts[start : start + prompts_per_batch])
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
        answers.extend(found[:, tokens.shape[1] :].tolist())
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "answers": [cut(tokens, set(end_token_ids)) for tokens in answers],
    }


def cut(tokens: list[int], end_token_ids: set[int]) -> list[int]:
    """Leaves the padding out."""
    end = next((index for index, token in enumerate(tokens) if token in end_token_ids), len(tokens) - 1)
    return tokens[: end + 1]


if __name__ == "__main__":
    main()
