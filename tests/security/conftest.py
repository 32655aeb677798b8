"""Fixtures of the security tests: a marker that no attack may create, a malicious pickle, a sound model folder."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.attacks import PickleAttack
from tests.tiny import save_teacher


@pytest.fixture
def marker(tmp_path) -> Iterator[Path]:
    """The path that an attack creates when it succeeds. After the test, it must not exist."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code from a file was executed"


@pytest.fixture
def malicious_pickle(marker) -> bytes:
    """A pickle that creates the marker when it is loaded."""
    return pickle.dumps(PickleAttack(marker))


@pytest.fixture
def model(tmp_path) -> Path:
    """A sound model folder, into which a test puts something malicious."""
    return save_teacher(tmp_path / "model")
