"""Makes tests/golden/trl_losses: what TRL's own trainers compute for each preference loss, values and gradients.

    python scripts/make_golden_trl_losses.py [--out tests/golden/trl_losses]

Needs the `parity` extra (torch, trl). Two tiny Llamas, policy and reference, have an identity for a language-model
head, so that the hidden states that reach the head are the logits, bit for bit, and the gradient that TRL's fused
head hands back to them is the gradient with respect to the logits. For each case a trainer is built from its
config, as a user builds it, and its loss is taken on one batch of unequal lengths. The same versions on the same
kind of machine give the same files to the byte.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SEED = 86
NUM_TOKENS, PAD, EOS = 12, 0, 1
LOGIT_SCALE = 1.1

LENGTHS = ((2, 3, 6), (4, 7, 2), (1, 1, 4), (3, 5, 5), (5, 6, 1))
"""Tokens of (prompt, chosen, rejected) of each pair: longer, shorter and equal sides, one-token completions."""

BETAS = (0.1, 0.5)
PLAIN = (
    *("sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm", "exo_pair"),
)
DIVERGENCES: tuple[dict[str, Any], ...] = (
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    *({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha} for alpha in (0.5, 2.0, 1.0)),
)
DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
WEIGHTED_LOSSES = (
    *("sigmoid", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("discopop", "sigmoid_norm"),
)
"""Not hinge nor sft: TRL multiplies the weights in place, which torch's backward of relu and of expand refuses."""

SHARED_LENGTH_LOSSES = ("sigmoid", "ipo", "sigmoid_norm", "hinge", "nca_pair", "aot", "aot_unpaired", "apo_down")

METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
)
"""The values that DPOTrainer logs in addition to the loss; its rewards are LD-weighted where `ld_alpha` is set."""

Case = dict[str, Any]
"""A trainer's name and the keyword arguments of its config that are not defaults."""


def main() -> None:
    """Writes the golden folder, then refuses it if it does not cover its cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden" / "trl_losses")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    quieten()
    with tempfile.TemporaryDirectory() as scratch:
        inputs, cases, gradients = run_cases(scratch)
    check_coverage(inputs, cases)
    np.savez_compressed(out / "inputs.npz", **inputs)
    np.savez_compressed(out / "gradients.npz", **gradients)
    versions = {name: version(name) for name in ("trl", "transformers", "torch")}
    lines = ",\n".join("  " + json.dumps(case) for case in cases)
    text = f'{{\n "versions": {json.dumps(versions)},\n "cases": [\n{lines}\n ]\n}}\n'
    (out / "cases.json").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{len(cases)} cases from {versions} in {out}, {size:,} bytes")


def quieten() -> None:
    """Silences libraries: one line per case is enough."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()


def all_cases() -> Iterator[Case]:
    """Returns every case; `trainer` is dpo, cpo or orpo, the rest goes to its config."""
    for beta in BETAS:
        for name in PLAIN:
            yield {"trainer": "dpo", **plain(name, beta)}
    yield {"trainer": "dpo", "loss_type": ["sft"], "beta": 0.5}
    yield {"trainer": "dpo", "loss_type": ["exo_pair"], "beta": 0.5, "label_smoothing": 1e-3}
    for name in ("robust", "aot", "aot_unpaired"):
        yield {"trainer": "dpo", "loss_type": [name], "beta": 0.5, "label_smoothing": 0.2}
    for divergence in DIVERGENCES:
        for name in DIVERGENCE_LOSSES:
            yield {"trainer": "dpo", **plain(name), **divergence}
    for ld_alpha in (0.0, 0.5):
        for name in SHARED_LENGTH_LOSSES:
            yield {"trainer": "dpo", **plain(name), "ld_alpha": ld_alpha}
    for name in WEIGHTED_LOSSES:
        yield {"trainer": "dpo", **plain(name), "use_weighting": True}
    for case in combined_cases():
        yield {"trainer": "dpo", "beta": 0.5, **case}
    for beta, cpo_alpha in ((0.1, 1.0), (0.5, 0.3)):
        yield {"trainer": "cpo", "loss_type": "sigmoid", "beta": beta, "cpo_alpha": cpo_alpha}
    for beta, gamma in ((2.0, 0.5), (2.5, 1.2)):
        yield {"trainer": "cpo", "loss_type": "simpo", "beta": beta, "simpo_gamma": gamma, "cpo_alpha": 0.0}
    for beta in BETAS:
        yield {"trainer": "orpo", "beta": beta}


def plain(name: str, beta: float = 0.5) -> Case:
    """Returns a loss with the options that it requires.

    DiscoPOP's gradient multiplies the rounding of its margin by beta / tau: at 0.5 / 0.05 TRL's float32 is 8e-6 away
    from exact, too near to the 1e-5 that the tests ask for. Its own tau is meant for beta 0.1.
    """
    needed: Case = {}
    if name == "exo_pair":
        needed = {"label_smoothing": 0.1}
    if name == "discopop" and beta > 0.1:
        needed = {"discopop_tau": 0.25}
    return {"loss_type": [name], "beta": beta, **needed}


def combined_cases() -> Iterator[Case]:
    """Returns cases with lists of losses, and with several options."""
    yield {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    yield {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    yield {"loss_type": ["sigmoid", "hinge"]}
    yield {"loss_type": ["ipo", "sigmoid_norm"], "loss_weights": [0.3, 2.0]}
    yield {"loss_type": ["aot", "aot_unpaired"], "loss_weights": [0.7, 0.5], "label_smoothing": 0.1}
    yield {"loss_type": ["hinge", "sigmoid_norm"], "loss_weights": [0.4, 1.5], "f_divergence_type": "forward_kl"}
    yield {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "f_divergence_type": "js_divergence"}
    yield {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "ld_alpha": 0.5}
    yield {"loss_type": ["sigmoid", "nca_pair"], "loss_weights": [0.5, 0.5], "use_weighting": True}
    yield {"loss_type": ["sigmoid"], "use_weighting": True, "ld_alpha": 0.5}
    yield {"loss_type": ["sigmoid_norm"], "use_weighting": True, "f_divergence_type": "js_divergence"}
    yield {"loss_type": ["ipo"], "ld_alpha": 0.5, "f_divergence_type": "forward_kl"}


def run_cases(scratch: str) -> tuple[dict[str, Any], list[Case], dict[str, Any]]:
    """Returns (common inputs, cases with TRL's values, gradients with respect to the logits by case index)."""
    policy, reference = tiny_llama(SEED), tiny_llama(SEED + 1)
    rows, tokenizer = make_rows(np.random.default_rng(SEED)), word_tokenizer()
    inputs: dict[str, Any] = {}
    cases, gradients = [], {}
    for index, case in enumerate(all_cases()):
        run = run_dpo if case["trainer"] == "dpo" else run_without_reference
        # A copy each: TRL patches the forward of the models it is given.
        values, gradient, read = run(case, copy.deepcopy(policy), copy.deepcopy(reference), rows, tokenizer, scratch)
        for name, array in read.items():
            assert np.array_equal(inputs.setdefault(name, array), array), f"{name} of {case} is not what others read"
        cases.append({**case, **values})
        gradients[str(index)] = gradient
        print(json.dumps({name: value for name, value in cases[-1].items() if name != "metrics"}), flush=True)
    return inputs, cases, gradients


def run_dpo(
    case: Case, policy: Any, reference: Any, rows: list[Case], tokenizer: Any, scratch: str
) -> tuple[Case, np.ndarray, dict[str, np.ndarray]]:
    """Returns DPOTrainer's loss and metrics, its gradient [2, b, t, v], and its input arrays [2, b, t, ...]."""
    from trl import DPOConfig, DPOTrainer

    settings = {name: value for name, value in case.items() if name != "trainer"}
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(max_length=64, **config_settings(scratch), **settings),
        train_dataset=text_dataset(),
        processing_class=tokenizer,
    )
    policy_logits, reference_logits = record_logits(policy), record_logits(reference)
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(policy, batch)
    loss.backward()
    metrics = {name: trainer._metrics["train"][name][-1] for name in METRICS}
    read = {name: by_side(batch[name]) for name in ("input_ids", "attention_mask", "completion_mask")}
    read |= {"policy_logits": by_side(policy_logits[0]), "reference_logits": by_side(reference_logits[0])}
    return {"loss": loss.item(), "metrics": metrics}, by_side(policy_logits[0].grad), read


def run_without_reference(
    case: Case, policy: Any, _: Any, rows: list[Case], tokenizer: Any, scratch: str
) -> tuple[Case, np.ndarray, dict[str, np.ndarray]]:
    """Returns CPOTrainer's loss, or ORPOTrainer's odds-ratio term minus its mean chosen log-prob (equation 6).

    ORPOTrainer's own supervised term runs over the prompt too and is a token mean over the batch; the paper's is
    the mean over sequences of the completion's per-token log-prob, which is what the trainer hands to its
    odds-ratio term.
    """
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    kind: Any = CPOTrainer if case["trainer"] == "cpo" else ORPOTrainer
    config = CPOConfig if case["trainer"] == "cpo" else ORPOConfig
    settings = {name: value for name, value in case.items() if name != "trainer"}
    trainer = kind(
        model=policy,
        args=config(remove_unused_columns=False, **config_settings(scratch), **settings),
        train_dataset=text_dataset(),
        processing_class=tokenizer,
    )
    logits = record_logits(policy)
    batch = trainer.data_collator([labelled(row) for row in rows])
    if case["trainer"] == "cpo":
        loss = trainer.compute_loss(policy, batch)
    else:
        chosen, rejected = trainer.concatenated_forward(policy, batch)[:2]
        loss = -chosen.mean() - trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    loss.backward()
    return {"loss": loss.item()}, by_side(logits[0].grad), {"policy_logits": by_side(logits[0])}


def config_settings(scratch: str) -> Case:
    """Returns settings for float32 on the CPU without reports."""
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": len(LENGTHS),
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def record_logits(model: Any) -> list[torch.Tensor]:
    """Returns a list that receives the hidden states (here the logits) of every forward, with their gradient."""
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.retain_grad()
        seen.append(hidden)

    model.base_model.register_forward_hook(keep)
    return seen


def by_side(array: Any) -> np.ndarray:
    """Reshapes TRL's rows, all chosen before all rejected, to [2, b, ...]."""
    rows = array.detach().numpy()
    rows = rows.astype(np.int32) if rows.dtype == np.int64 else rows
    return rows.reshape(2, -1, *rows.shape[1:])


def tiny_llama(seed: int) -> Any:
    """Makes a random float32 Llama whose head is the identity and whose logits are about LOGIT_SCALE wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=NUM_TOKENS,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data = torch.eye(NUM_TOKENS)
    model.model.norm.weight.data = LOGIT_SCALE * (0.5 + torch.rand(NUM_TOKENS))
    return model


def make_rows(rng: np.random.Generator) -> list[Case]:
    """Makes token ids of each pair as TRL's preprocessing does; completions end in EOS."""

    def words(count: int) -> list[int]:
        return [int(token) for token in rng.integers(EOS + 1, NUM_TOKENS, count)]

    return [
        {
            "prompt_ids": words(prompt),
            "chosen_ids": [*words(chosen - 1), EOS],
            "rejected_ids": [*words(rejected - 1), EOS],
        }
        for prompt, chosen, rejected in LENGTHS
    ]


def labelled(row: Case) -> Case:
    """Returns a row in the form of the CPO and ORPO collator: labels are -100 on the prompt."""
    features = {}
    for side in ("chosen", "rejected"):
        tokens = row["prompt_ids"] + row[f"{side}_ids"]
        features[f"{side}_input_ids"] = tokens
        features[f"{side}_attention_mask"] = [1] * len(tokens)
        features[f"{side}_labels"] = [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
    return features


def word_tokenizer() -> Any:
    """Makes a tokenizer of NUM_TOKENS words, which the trainers require but the batch does not use."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{token}": token for token in range(EOS + 1, NUM_TOKENS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def text_dataset() -> Any:
    """Returns one row of text for the trainers' constructors."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "w2 w3", "chosen": " w4", "rejected": " w5 w6"}])


def check_coverage(inputs: dict[str, np.ndarray], cases: list[Case]) -> None:
    """Fails unless log-ratios have both signs and reach the curved part of each loss, and sorting reorders pairs."""
    policy, reference = (completion_logps(inputs, f"{name}_logits") for name in ("policy", "reference"))
    log_ratios = policy - reference
    margins = log_ratios[0] - log_ratios[1]
    sorted_by_aot = (policy[0] - policy[1], reference[0] - reference[1], *log_ratios)
    print(f"log-ratios\n{log_ratios.round(2)}\nmargins {margins.round(2)}")
    covered = {
        "log-ratios beyond 1 on both signs and sides": all(x.min() < -1 and x.max() > 1 for x in log_ratios),
        "margins of both signs beyond 2, so that every beta bends": margins.min() < -2 and margins.max() > 2,
        "a margin below 1": np.abs(margins).min() < 1,
        "log-ratios below 5, so that float32 resolves their exponentials": np.abs(log_ratios).max() < 5,
        "four sorts that differ": len({tuple(np.argsort(x).tolist()) for x in sorted_by_aot}) == 4,
        "finite losses": all(np.isfinite(case["loss"]) for case in cases),
    }
    if not all(covered.values()):
        raise SystemExit(f"this golden folder does not cover what it is for: {covered}")


def completion_logps(inputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Returns summed completion log-probs [2, b] in float64."""
    logits = inputs[name][:, :, :-1].astype(np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = inputs["input_ids"][:, :, 1:, None]
    taken: np.ndarray = np.take_along_axis(logps, targets, -1)[..., 0] * inputs["completion_mask"][:, :, 1:]
    return taken.sum(-1)


if __name__ == "__main__":
    main()
