"""What `LoadedModel` is made of: the text of answers, log-probabilities of tokens, and answers for files."""
