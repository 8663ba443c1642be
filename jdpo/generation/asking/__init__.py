"""The parts of `LoadedModel`: the text of answers, log-probabilities of tokens, and answers for files."""
