"""The tasks of the experiments. Every task subclasses harness.task.Task."""
