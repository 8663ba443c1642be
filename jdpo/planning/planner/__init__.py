"""What a run would do on a machine: the choice of its step, and what that needs, sends and takes."""
