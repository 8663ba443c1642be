"""From datasets to batches: sources, schemas, chat templates, tokens, masks, the cache, and the plan of each step."""
