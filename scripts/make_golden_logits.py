"""Writes tests/golden/logits: a tiny model folder a family, with the logits that transformers' torch model gives.

The tests load each folder and compare, so that parity is checked where torch is not installed.

    python scripts/make_golden_logits.py        # needs the parity extra; rewrites every folder, seeded
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).parents[1] / "tests" / "golden" / "logits"
BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 6}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    for name, (prefix, overrides) in CASES.items():
        write_case(OUT / name, prefix, {**BASE, **overrides})
        print(f"{OUT / name}")


def write_case(folder: Path, prefix: str, settings: dict[str, Any]) -> None:
    """A bfloat16 folder with norms and biases away from 1 and 0, padded tokens, and the float32 logits on them."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    # Read back, since .to(bfloat16) has rounded the rotary frequencies too.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (3, 12))
    mask = np.ones(tokens.shape, bool)
    mask[1, 8:] = False  # padded right
    mask[2, :5] = False  # padded left
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        logits = model(
            torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), position_ids=torch.tensor(positions)
        ).logits
    np.savez(folder / "expected.npz", tokens=tokens.astype(np.int32), mask=mask, logits=logits.numpy())


if __name__ == "__main__":
    main()
