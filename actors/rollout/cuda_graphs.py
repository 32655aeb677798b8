"""Recorder of `step_forward.py` for NVIDIA GPUs: a CUDA graph a shape."""

from __future__ import annotations

from collections.abc import Callable

import torch

from opdlm.actors.rollout.forward import Forward
from opdlm.common.errors import OpdlmError


class CudaGraphs:
    """Graphs that share their working memory: they are replayed one after the other, never side by side.

    To be let go of with its graphs: memory whose graphs are all gone takes no new ones.
    """

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, forward: Forward, arguments: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
        """See `Record`.

        Raises:
            OpdlmError: the model's forward waits for the GPU, or does something else that a graph cannot hold.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            forward(*arguments)  # what libraries set up at first use must not become a part of the graph
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # By thread: another one may take in new weights meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = forward(*arguments)
        except RuntimeError as error:
            raise OpdlmError(
                f"rollout.cuda_graphs: the forward of this model cannot be recorded ({error}); set it to false"
            ) from error

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay
