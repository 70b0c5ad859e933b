"""The command line: what may be typed for an option, and how words become options."""
