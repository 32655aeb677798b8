"""Rollout: the student decodes prompts to trajectories (METHOD.md section 2).

    actor.py        RolloutActor: a Ray actor that decodes continuously
    student.py      its model, weight versions and decoders
    engine_thread.py  one thread that uses the model: steps, and jobs between them
    stream.py       the requests and trajectories of a stream
    decoder.py      BlockDecoder: the engine; takes requests, runs denoising steps, gives trajectories
    denoise.py      one denoising step of all slots
    settings.py     DecodeSettings: what a decoder is set to
    slots.py        the decoder's state, one row per sequence
    sequences.py    a sequence before and after it has a slot
    sampling.py     candidates of masked positions
    remasking.py    strategies: which positions a step reveals
    forward.py      the forward of a denoising step; cuda_graphs.py records it
    attention.py    who attends to what in that forward
    kv_cache.py     keys and values of finished blocks, in positions that all slots share
    places.py       where in them each sequence lies
    observation.py  StepObservation: what an observer sees of a step

A public name is imported with its module when it is first used, so importing this package loads neither torch nor Ray.
"""

from __future__ import annotations

from opdlm.common.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "actor": ["RolloutActor", "start_rollout_actor"],
        "cuda_graphs": ["CudaGraphs"],
        "decoder": ["BlockDecoder"],
        "observation": ["StepObservation"],
        "remasking": ["STRATEGIES", "DenoisingStep"],
        "settings": ["DecodeSettings"],
    },
)
