"""Plans a run on a machine: chooses its step, and finds what that needs, sends and takes."""
