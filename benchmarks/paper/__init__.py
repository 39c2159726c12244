"""The paper's tables and what lies beyond, each by one command.

    python -m benchmarks.paper one-shot --scale small --output docs/results/small

Parents and cells live in --runs and are used as they are, so a command that was stopped goes on; with --render the
table is made from the cells that are there.
"""
