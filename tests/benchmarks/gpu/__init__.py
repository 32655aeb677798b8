"""Measurements on one GPU, each beside its floor: `make bench-gpu`, or one module alone.

Each module prints a line as soon as it has it and appends it to a file of JSON lines, so that a run that is cut off
still tells what it had. `--device cpu --tiny` tries the module itself.
"""
