"""The frozen autoregressive teacher: targets of trajectories, and plain generation (METHOD.md section 3).

    actor.py       TeacherActor: a backend in a Ray actor
    backends.py    TeacherBackend: the interface; the transformers backend; the choice of a backend
    scoring.py     score: targets from one causal forward
    generation.py  generate: plain autoregressive generation
    vllm.py        the vLLM backend

A public name is imported with its module when it is first used, so importing this package loads neither torch nor Ray.
"""

from __future__ import annotations

from opdlm.common.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "actor": ["ScoreStats", "TeacherActor", "start_teacher_actor"],
        "backends": ["TeacherBackend", "TransformersTeacher", "make_backend"],
        "generation": ["generate"],
        "scoring": ["score"],
        "vllm": ["VllmTeacher"],
    },
)
