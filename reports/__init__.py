"""Read result files; write text, pictures and pages. Nothing here imports torch."""
