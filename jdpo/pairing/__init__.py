"""Preference pairs made of a model's own answers: which answers are compared, which pairs are kept, and why not."""
