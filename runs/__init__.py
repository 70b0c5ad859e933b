"""What a run keeps and reads back: its folder, checkpoints and results."""
