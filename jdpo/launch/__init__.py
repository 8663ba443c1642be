"""Scripts and manifests that start a run on a cluster, a TPU slice or a host, and start it again after a preemption."""
