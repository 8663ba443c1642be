"""Training steps compiled for devices that are not at hand: their memory, FLOPs, collectives and estimated time."""
