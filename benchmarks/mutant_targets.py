"""Functions in which `mutants.py` plants faults, tests that should find them, and faults that no test can find."""

from __future__ import annotations

from typing import NamedTuple

from mutation_operators import Mutant


class Target(NamedTuple):
    """Functions of one module.

    Attributes:
      area: what a fault in them would break.
      module: its path.
      functions: their qualified names.
      tests: the fewest test files that should find a fault in them.
    """

    area: str
    module: str
    functions: tuple[str, ...]
    tests: tuple[str, ...]


TARGETS = (
    Target(
        "losses",
        "jdpo/losses/pairwise.py",
        (
            *(
                "LossInputs.margin",
                "per_token",
                "smoothed",
                "square",
                "robust",
                "hinge",
                "ipo",
                "ipo_sum",
                "sigmoid_norm",
                "exo_pair",
            ),
            *("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"),
        ),
        ("tests/losses/test_formulas.py", "tests/losses/test_preference.py"),
    ),
    Target(
        "losses",
        "jdpo/losses/reference_free.py",
        ("log1mexp", "simpo", "simper", "cpo", "orpo", "sft"),
        ("tests/losses/test_reference_free.py",),
    ),
    Target(
        "losses",
        "jdpo/losses/coupled.py",
        ("_by_quantile", "_ascending", "update_loss_state"),
        ("tests/losses/test_formulas.py", "tests/losses/test_preference.py", "tests/losses/test_pair_losses.py"),
    ),
    Target("losses", "jdpo/losses/pairwise.py", ("divergence_score",), ("tests/losses/test_formulas.py",)),
    Target(
        "losses",
        "jdpo/losses/pair_losses.py",
        ("loss_inputs", "loss_terms", "rewards", "token_share"),
        ("tests/losses/test_formulas.py", "tests/losses/test_preference.py"),
    ),
    Target(
        "losses",
        "jdpo/losses/logprobs.py",
        ("token_logps", "token_log_sum_sq", "shifted_token_logps", "sequence_logps"),
        ("tests/losses/test_logprobs.py",),
    ),
    Target(
        "losses",
        "jdpo/losses/pair_logps.py",
        ("_token_scores", "pair_features", "_sums", "_reference_token_logps"),
        ("tests/losses/test_pair_losses.py",),
    ),
    Target(
        "losses",
        "jdpo/losses/pair_losses.py",
        ("pair_totals", "feature_losses", "next_loss_state", "weighted_sum"),
        ("tests/losses/test_pair_losses.py",),
    ),
    Target("losses", "jdpo/losses/dpo.py", ("_batch_loss", "_mean"), ("tests/losses/test_pair_losses.py",)),
    Target(
        "packing",
        "jdpo/losses/pair_logps.py",
        ("belongs", "completion_sums", "tail_weights"),
        ("tests/losses/test_packed_sums.py",),
    ),
    Target("packing", "jdpo/losses/pair_losses.py", ("packed_totals",), ("tests/losses/test_packed_sums.py",)),
    Target(
        "packing",
        "jdpo/data/batching/packing.py",
        ("pack_step", "_layout", "_slot_arrays", "_attention_arrays", "_scored_arrays"),
        ("tests/data/batching/test_packing.py",),
    ),
    Target(
        "packing",
        "jdpo/data/batching/packing_plan.py",
        ("pair_sizes", "item_sizes", "plan_step", "needed_sizes", "plan_run"),
        ("tests/data/batching/test_packing_plan.py",),
    ),
    Target(
        "packing",
        "jdpo/data/batching/packing_shapes.py",
        ("choose_shapes", "_distinct", "_merged", "_cheapest"),
        ("tests/data/batching/test_packing_plan.py",),
    ),
    Target(
        "packing",
        "jdpo/models/packed_attention.py",
        ("packed_sequences", "num_readers", "_to_places_backward", "_to_slots_backward"),
        ("tests/models/test_packed_attention.py",),
    ),
    Target(
        "masks",
        "jdpo/models/attention/xla.py",
        ("dot_product_attention", "visible_keys", "right_padded_attention"),
        ("tests/models/attention/test_attention.py",),
    ),
    Target(
        "masks",
        "jdpo/data/batching/loader.py",
        ("collate_pairs", "collate_completions", "_weights", "bucket_length"),
        ("tests/data/batching/test_loader.py",),
    ),
    Target(
        "masks",
        "jdpo/losses/argument_checks.py",
        ("check_batch", "check_completions", "check_lengths"),
        ("tests/losses/test_argument_checks.py", "tests/losses/test_pair_losses.py"),
    ),
    Target(
        "boundaries",
        "jdpo/data/tokens/boundaries.py",
        ("_unusable", "_split_texts", "with_bos", "_with_eos", "_split_encoded"),
        ("tests/data/tokens/test_tokenize.py",),
    ),
    Target(
        "boundaries",
        "jdpo/data/tokens/tokenize.py",
        ("_fit_pair", "_fit_completion", "_cut_prompt"),
        ("tests/data/tokens/test_tokenize.py",),
    ),
    Target(
        "boundaries",
        "jdpo/data/tokens/prompt_end.py",
        ("_merge_notes", "without_header", "_longest_suffix", "common_prefix", "_shared"),
        ("tests/data/tokens/test_prompt_end.py",),
    ),
    Target(
        "resume",
        "jdpo/data/batching/loader.py",
        ("num_steps_per_epoch", "plan", "RowPlan.step", "RowPlan._group"),
        ("tests/data/batching/test_loader.py",),
    ),
    Target(
        "resume",
        "jdpo/data/batching/mixing.py",
        ("_weighted", "apportion", "epoch_order", "_stream"),
        ("tests/data/batching/test_mixing.py",),
    ),
    Target(
        "resume",
        "jdpo/config/resuming.py",
        ("differences", "changed_keys", "_at", "_meaning", "_meaning_of_lora", "_meaning_of_dataset"),
        ("tests/test_config.py",),
    ),
    Target(
        "resume",
        "jdpo/checkpoint/steps.py",
        ("complete_steps", "fault_of", "digests_of", "settle_steps", "refuse_foreign", "_is_cut_off", "best_of"),
        ("tests/checkpoint/test_manager.py",),
    ),
    Target(
        "resume",
        "jdpo/training/run_dir.py",
        tuple(f"RunDirectory.{name}" for name in ("_check_owner", "_never_began", "_is_lost", "compare_inputs")),
        ("tests/training/test_run_dir.py",),
    ),
)

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "token_logps",
        "chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 1]",
    ): "The last axis has one entry, and JAX holds an index that is too large at the last one.",
    (
        "right_padded_attention",
        "return dot_product_attention(query_nthk, key_ntgk, value_ntgk, query_positions_nt=positions_nt, "
        "key_positions_ns=positions_nt, key_mask_ns=positions_nt <= lengths_n[:, None], segments_nt=segments_nt, "
        "sinks_h=sinks_h, window=window, softcap=softcap, scale=scale)",
    ): "Only padding queries are late enough to see the key after the last real one; what they return has no meaning.",
    (
        "_meaning",
        "if isinstance(value, list | tuple):",
    ): "Of the keys that are compared, only datasets has a list of mappings; other items are compared as they are.",
}
"""(function, changed lines) -> why no test can tell the mutant from the original."""


class Job(NamedTuple):
    """A mutant and the tests that should find it."""

    target: Target
    mutant: Mutant

    @property
    def tests(self) -> tuple[str, ...]:
        """Returns the arguments of pytest; the module's doctests come first, as they are fast."""
        return (self.target.module, *self.target.tests)

    @property
    def reason(self) -> str | None:
        """Returns why no test can kill the mutant, or None."""
        return EQUIVALENT.get((self.mutant.function, self.mutant.after))

    @property
    def key(self) -> str:
        """Names the mutant for as long as its module and the lines that it changes stay as they are."""
        return f"{self.target.module} {self.mutant.function}: {self.mutant.before} -> {self.mutant.after}"

    def diff(self) -> str:
        """Shows the mutant as a diff of the lines that it changes."""
        mutant = self.mutant
        removed, added = (
            [f"{sign} {line}" for line in text.splitlines()] for sign, text in zip("-+", mutant[3:], strict=True)
        )
        return "\n".join([f"# {self.target.module}: {mutant.function} ({mutant.operator})", *removed, *added])
