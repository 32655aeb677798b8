"""What one denoising step looks like from outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StepObservation:
    """One denoising step as an observer sees it (`generate --trace`, `trace`, parity tests). Rows are live slots.

    What the model says (from `candidates` on) is there for masked positions, and 0 elsewhere.
    """

    index: list[int]  # [n] request index
    step: list[int]  # [n] denoising step of the sequence, from 1
    positions: torch.Tensor  # [n, S] int64
    tokens: torch.Tensor  # [n, S] int64, before the step (prompt tokens and masks included)
    masked: torch.Tensor  # [n, S] bool, before the step
    revealed: torch.Tensor  # [n, S] bool
    candidates: torch.Tensor  # [n, S] int64
    confidence: torch.Tensor  # [n, S] float32
    logits: torch.Tensor  # [n, S, V] float32, the mask token at minus infinity
    mask_logit: torch.Tensor  # [n, S] float32, what the model said for the mask token
