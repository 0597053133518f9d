"""What benchmarks and experiments share. Scripts in the folder above are run by path and import it as `harness`.

Experiments, from the top: program (command line, result files), session (every task, arm and seed once), compare
(verdicts), task (what a task says), arms (memories and their controls), switches (what pages did), statistics. How to
add a runner: benchmarks/README.md.

resident.py and timing.py need torch and the standard library alone: workers import them in foreign environments.
"""
