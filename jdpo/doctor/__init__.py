"""Checks a cluster before a run: its processes, devices, folders, code, data and clocks."""
