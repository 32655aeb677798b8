"""`python -m deploy.cli`: the same where the package is not installed."""

from deploy.cli import app

app()
