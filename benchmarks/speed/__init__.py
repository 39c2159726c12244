"""What a fusion costs: its time in forward passes of the parents, and its memory beyond theirs.

    python -m benchmarks.speed [ratio depth samples plain large] [--output docs/results/speed]

Each cell is measured in a process of its own and kept in --runs, so a command that was stopped goes on. All tables
share one picture, speed.png; with --render everything is written from the cells that are there.
"""
