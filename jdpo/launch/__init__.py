"""Starts runs on clusters: files and commands for JobSet, Slurm, SkyPilot, TPU VMs and single hosts."""
