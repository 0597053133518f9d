"""Shared code of benchmarks and experiments. Scripts in the folder above are run by path and import it as `harness`.

Experiments, from the top: program (command line, result files), session (every task, arm and seed once), compare
(verdicts), task (the interface of a task), arms (memories and their controls), switches (counts of page switches),
statistics. How to add a runner: benchmarks/README.md.

resident.py and timing.py need only torch and the standard library: workers import them in the peer's environment.
"""
