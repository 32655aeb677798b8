"""The names of the export layouts, without what it takes to write one (`layouts.py`)."""

from __future__ import annotations

from typing import Literal

LayoutName = Literal["a2d-qwen3", "a2d-qwen2", "a2d-llama", "sdar", "qwen3", "qwen2", "llama"]
