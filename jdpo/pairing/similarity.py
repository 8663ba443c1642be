"""Similarity of texts by their words, to find answers that are nearly the same."""

from __future__ import annotations

import re

_NGRAM = 3

# Scripts that write no spaces: each character is a word. Otherwise runs of letters and digits, and single signs, since
# `a + b` and `a - b` are different answers.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_NO_SPACES}]|[^\\W{_NO_SPACES}]+|[^\\w\\s]")


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case; a punctuation mark is a word, whitespace is nothing.

    >>> words_of("It's Dublin."), words_of("東京 2")
    (['it', "'", 's', 'dublin', '.'], ['東', '京', '2'])
    """
    return [word.casefold() for word in _WORD.findall(text)]


def ngrams(text: str) -> frozenset[tuple[str, ...]]:
    """Returns the set of all runs of three words; a shorter text is one run."""
    words = words_of(text)
    count = max(1, len(words) - _NGRAM + 1)
    return frozenset(tuple(words[start : start + _NGRAM]) for start in range(count))


def similarity(first: frozenset[tuple[str, ...]], second: frozenset[tuple[str, ...]]) -> float:
    """Returns the Jaccard similarity of two sets of n-grams: the share of all n-grams that both have, from 0 to 1.

    >>> similarity(ngrams("one two three four five"), ngrams("One two three four six"))
    0.5
    """
    return len(first & second) / len(first | second)
