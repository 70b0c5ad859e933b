"""One file for each command of `python main.py`."""
