"""`python -m opdlm`: the command line, also where the package is not installed."""

from opdlm.deploy.cli import app

app()
