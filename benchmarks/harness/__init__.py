"""What benchmarks and experiments share. Scripts in the folder above are run by path and import it as `harness`.

resident.py and timing.py need torch and the standard library alone: workers import them in foreign environments.
"""
