"""Recorder of `step_forward.py` for NVIDIA GPUs: a CUDA graph a shape."""

from __future__ import annotations

from collections.abc import Callable

import torch

from actors.step_forward import Forward
from common.errors import OpdlmError


class CudaGraphs:
    """Graphs that share their working memory: they are replayed one after the other, never side by side."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward, arguments: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
        """See `Record`.

        Raises:
            OpdlmError: the model's forward waits for the GPU, or does something else that a graph cannot hold.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward(*arguments)  # what libraries set up at first use must not become a part of the graph
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # By thread: another one may take in new weights meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = forward(*arguments)
        except RuntimeError as error:
            raise OpdlmError(
                f"rollout.cuda_graphs: the forward of this model cannot be recorded ({error}); set it to false"
            ) from error

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay
