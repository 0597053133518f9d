"""What the experiments' memories are asked to do. Every task subclasses harness.task.Task."""
