"""`opdlm`: the command line. Each command imports the module that does its work only when it is called."""

from opdlm.deploy.cli import checkpoints, evaluation, planning, runs, serving, training  # registers their commands
from opdlm.deploy.cli.app import app

__all__ = ["app", "checkpoints", "evaluation", "planning", "runs", "serving", "training"]
