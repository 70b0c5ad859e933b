"""What the library raises for its user to read."""


class InspectError(ValueError):
    """A model, a step or a file does not fit what was asked; the message says what to do."""
