"""The answers of `jdpo plan` for several machines: rows of a step, run time, cost, a table, and settings to paste."""
