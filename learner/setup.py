"""What the learner's worker group is started with.

Light to import (no torch, no Ray): the driver, Ray Train's own actors and the ranks all load this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opdlm.common.token_ids import TokenIds


@dataclass(frozen=True, slots=True)
class LearnerSetup:
    """Arguments of every rank. They are plain data, so that a restarted group gets the same."""

    config: dict[str, Any]
    """The resolved run file."""
    student: str
    """Folder of the student's start weights."""
    total_samples: int
    """Samples that the run trains on, over all rounds."""
    config_digest: str
    """Fingerprint of the run file, stored in every checkpoint."""
    data_digest: str
    """Fingerprint of the prompts, stored in every checkpoint: a run is not resumed on other data."""
    queue: Any
    """Handle of the replay queue actor."""
    tokens: TokenIds | None = None
    """The tokens that teacher and student share. None: all rows of the teacher."""
