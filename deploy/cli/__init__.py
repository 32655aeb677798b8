"""`opdlm`: the command line. Each command's work is in a module of its own; heavy imports wait until it is called."""

from opdlm.deploy.cli import checkpoints, evaluation, planning, runs, training  # their commands register with the app
from opdlm.deploy.cli.app import app

__all__ = ["app", "checkpoints", "evaluation", "planning", "runs", "training"]
