"""Write and read back everything that a run keeps: its folder, checkpoints and results."""
