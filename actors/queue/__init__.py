"""The replay queue between decoding and training.

    rules.py  ReplayQueue: slots, staleness, and which samples are decoded, kept and forgotten; without Ray
    actor.py  ReplayQueueActor: the Ray actor around the rules; also passes on weights and events

A public name is imported with its module when it is first used, so importing this package loads neither torch nor Ray.
"""

from __future__ import annotations

from opdlm.common.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "actor": ["ReplayQueueActor", "start_queue"],
        "rules": ["ReplayQueue"],
    },
)
