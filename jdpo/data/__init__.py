"""From data sets to batches: sources, formats, chat templates and masks, the cache, and what each step trains on."""
