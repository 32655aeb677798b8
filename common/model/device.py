"""The device of a process of a run: its share of GPUs in the run file decides, not what torch sees.

Ray does not hide a machine's GPUs from a process that reserves none of them.
"""

from __future__ import annotations

import torch

from opdlm.common.errors import OpdlmError


def device_for(gpus: float, setting: str) -> str:
    """`cuda` for a process with a share of GPUs, `cpu` for one without.

    Args:
        gpus: GPUs that Ray reserved for the process.
        setting: where the run file or the command line says so, for the error.

    Raises:
        OpdlmError: there is a share, but torch can use no GPU.
    """
    if gpus <= 0:
        return "cpu"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found = "finds no GPU that it can use" if built else "is built without CUDA"
        raise OpdlmError(
            f"{setting}: found {gpus:g}, but torch {torch.__version__} on this node {found}; install a torch and a "
            "driver that fit the GPU, or set it to 0"
        )
    return "cuda"


def multiplies_bfloat16(capability: str) -> bool:
    """Whether a CPU multiplies matrices of bfloat16 at least as fast as of float32. Without AVX-512, x86 does not.

    Args:
        capability: as of `torch.backends.cpu.get_cpu_capability()`.
    """
    return capability not in ("NO AVX", "AVX2")
