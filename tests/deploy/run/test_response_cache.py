"""What the file of the teacher's responses holds. `pytest tests/deploy/run/test_response_cache.py`"""

from __future__ import annotations

import asyncio

from opdlm.common.data.prompts import PromptOrder
from opdlm.deploy.observe.progress import RunProgress
from opdlm.deploy.run import given_responses as offline
from tests.deploy.run.test_given_responses import Teachers, cached  # noqa: F401  (a fixture)


def test_the_cache_gives_back_what_the_teacher_said(cached) -> None:  # noqa: F811
    config, prompts, given = cached
    again = offline.known_responses(config, prompts, "digest")
    assert again is not None
    assert again.cached
    assert again.forward_tokens == given.forward_tokens > 0
    assert {k: v.tolist() for k, v in again.by_prompt.items()} == {k: v.tolist() for k, v in given.by_prompt.items()}
    assert list(offline.cache_file(config).parent.iterdir()) == [offline.cache_file(config)]


def test_only_the_prompts_of_the_runs_rounds_are_answered(cached, tmp_path) -> None:  # noqa: F811
    config, prompts, _ = cached
    cache = config.offline.model_copy(update={"cache": str(tmp_path / "few.parquet")})
    config = config.model_copy(update={"offline": cache})
    order, made_of = PromptOrder(prompts, 0, 3), offline.response_recipe(config, "digest")
    assert sorted(p.prompt_id for p in order.used(13)) == [p.prompt_id for p in prompts], "each prompt once"

    def run(samples: int) -> tuple[offline.GivenResponses, int]:
        teachers, used = Teachers(), order.used(samples)
        assert offline.known_responses(config, used, "digest") is None
        given = asyncio.run(offline.generate_responses(config, used, teachers, made_of, RunProgress()))
        tokens = sum(len(p.ids) + len(given.by_prompt[p.prompt_id]) - 1 for p in used)
        known = offline.known_responses(config, used, "digest")
        assert known is not None
        assert known.forward_tokens == given.forward_tokens == tokens
        return given, teachers.prompts

    short, asked = run(2)
    assert (list(short.by_prompt), asked) == ([order[i].prompt_id for i in (0, 1)], 2)
    longer, asked = run(5)
    assert asked == 3, "two of five are in the file already"
    assert all(longer.by_prompt[name].tolist() == ids.tolist() for name, ids in short.by_prompt.items())
    again = offline.known_responses(config, order.used(2), "digest")
    assert again is not None
    assert (list(again.by_prompt), again.forward_tokens) == (list(short.by_prompt), short.forward_tokens)
