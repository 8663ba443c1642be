"""Tokenizes one row at a time."""

from __future__ import annotations

from typing import Any

from jdpo.data.tokens.tokenize import KeptCompletion, KeptPair, tokenize_completions, tokenize_pairs
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.data.tokens.turns import Dropped
from jdpo.types import CompletionRow, PreferenceRow


def tokenize_pair(row: PreferenceRow, tokenizer: Tokenizer, **limits: Any) -> KeptPair | Dropped:
    (result,) = tokenize_pairs([row], tokenizer, **limits)
    return result


def tokenize_completion(row: CompletionRow, tokenizer: Tokenizer, **limits: Any) -> KeptCompletion | Dropped:
    (result,) = tokenize_completions([row], tokenizer, **limits)
    return result
