"""The recorder of `forward.py` for NVIDIA GPUs: one CUDA graph per shape."""

from __future__ import annotations

from collections.abc import Callable

import torch

from opdlm.actors.rollout.forward import Forward
from opdlm.common.errors import OpdlmError


class CudaGraphs:
    """A `Recorder` whose graphs share one memory pool: they may be replayed one after another, never concurrently.

    Drop the object together with its graphs and make a new one for new graphs: PyTorch frees the pool with its last
    graph, and no graph can be captured into it after that.
    """

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, forward: Forward, arguments: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
        """See `Recorder`.

        Raises:
            OpdlmError: the model's forward waits for the GPU, or does something else that a CUDA graph cannot hold.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            forward(*arguments)  # libraries set themselves up at first use; the graph must not hold that
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # `thread_local`: the actor's other thread may fetch new weights during the capture.
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
