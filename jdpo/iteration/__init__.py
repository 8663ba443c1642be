"""Rounds of generate, score, pair, train and compare, each stage an ordinary command."""
