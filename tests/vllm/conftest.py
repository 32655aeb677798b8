"""Settings for vLLM on a CPU, made before anything imports it, and the `vllm` marker."""

from __future__ import annotations

import importlib.util
import os

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
if importlib.util.find_spec("vllm") is not None:  # elsewhere this file is read, too, and other tests compile
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else the first scoring call compiles for half a minute


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vllm: needs vLLM, in an environment of its own (`make test-vllm`)")
