"""Serving: the continuous decoder behind requests that come, stream and are cancelled one by one. Imports no ray."""
