"""Result files in; words, pictures and pages out. Nothing here imports torch."""
