class TrainingError(Exception):
    """Ends a run with one line for the user and a non-zero exit status, instead of a traceback."""


class Diverged(TrainingError):
    """The loss, the model or a measurement of it is not finite."""
