"""Define the errors that the library raises for its user."""


class InspectError(ValueError):
    """The model, the step or a file does not fit the request; the message says what to do."""
