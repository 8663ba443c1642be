"""What `jdpo plan` tells about several machines: the rows of a step, run time, cost, a table, and settings to paste."""
