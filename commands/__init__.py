"""One file a command: what `python main.py COMMAND` does."""
