"""Reads config.json of each family into the mechanisms of the decoder."""
