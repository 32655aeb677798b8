"""Tests mirror the rooms: `tests/actors/rollout/test_decoder.py` is about `actors/rollout/decoder.py`."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
