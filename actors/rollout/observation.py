"""What the decoder shows an observer of its denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StepObservation:
    """One denoising step, for an observer (`generate --trace`, `trace`, the parity tests). One row per occupied slot.

    All tensors are on the CPU. `candidates` and the fields after it hold values at masked positions and 0 elsewhere.
    """

    index: list[int]  # [n] request index
    step: list[int]  # [n] denoising step of the sequence, counted from 1
    positions: torch.Tensor  # [n, S] int64
    tokens: torch.Tensor  # [n, S] int64, before the step (prompt tokens and masks included)
    masked: torch.Tensor  # [n, S] bool, before the step
    revealed: torch.Tensor  # [n, S] bool, by this step
    candidates: torch.Tensor  # [n, S] int64
    confidence: torch.Tensor  # [n, S] float32
    logits: torch.Tensor  # [n, S, V] float32, minus infinity for the mask token
    mask_logit: torch.Tensor  # [n, S] float32, the model's own logit of the mask token
