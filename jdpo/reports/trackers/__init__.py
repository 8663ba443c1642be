"""Trackers: where the lines of a run go in addition to metrics.jsonl. See docs/trackers.md."""
