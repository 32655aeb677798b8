"""The actors of a run and their pool.

    members.py       Members: actors that may die, be restarted, be added and be retired, and calls to one of them
    pool.py          ActorPool: members, and calls to whichever is free
    engine_guard.py  ends the process of an actor whose engine is dead, so that Ray restarts it
    rollout/         the student's block decoder, and the Ray actor around it
    teacher/         the teacher's backends (transformers, vLLM), and the Ray actor around one of them
    queue/           the rules of the replay queue, and the Ray actor around them

`actors/` imports `common/`, and never `learner/` or `deploy/`. A public name is imported with its module when it is
first used, so importing this package loads neither torch nor Ray.
"""

from __future__ import annotations

from opdlm.common.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "engine_guard": ["guarded", "one_token_forward"],
        "members": ["Members", "stop_actors", "value_of"],
        "pool": ["ActorPool"],
    },
)
