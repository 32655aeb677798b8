"""What tasks of lm-eval ask of decoding: stop strings of AR checkpoints, and the benchmarks that the documents name.

`pytest tests/deploy/evaluate/test_lm_eval_tasks.py`
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from opdlm.deploy.evaluate.actor_decoder import ActorDecoder
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.lm_eval_model import OpdlmLM
from tests import REPOSITORY
from tests.deploy.evaluate.test_lm_eval import LIMIT, PROMPTS, _request, asked, direct


def test_a_stop_string_ends_the_response_of_an_autoregressive_checkpoint(chain_teacher) -> None:
    """Each row of a batch with the token that completes a stop string of its own."""
    decoder = CheckpointDecoder(chain_teacher)
    whole = direct(chain_teacher)
    stops = [(text[2:4],) if i % 2 else ("never", "") for i, text in enumerate(whole)]
    assert any(len(text) > 5 for text in whole[1::2])
    asked_for = [replace(_request(decoder, i, LIMIT), stop=stop) for i, stop in enumerate(stops)]
    answers = decoder.answer(asked_for, decoder.base, 3)
    for i, (text, stop, ids) in enumerate(zip(whole, stops, answers.responses, strict=True)):
        found = decoder.tokenizer.decode(ids, skip_special_tokens=True)
        assert found == (text[: text.find(stop[0]) + len(stop[0])] if i % 2 else text)
    assert answers.tokens == sum(map(len, answers.responses)) < sum(map(len, whole))
    model = OpdlmLM(decoder, batch_size=3)
    first = asked(PROMPTS[1:2], until=[whole[1][2:4]], max_gen_toks=LIMIT)
    assert model.generate_until(first, disable_tqdm=True) == [whole[1].split(whole[1][2:4])[0]]
    assert model._tokens == len(answers.responses[1])


@pytest.mark.parametrize(
    ("folder", "task", "settings"),
    [
        ("gsm8k", "gsm8k", {"num_fewshot": 5, "until": "Question:"}),
        ("gsm8k", "gsm8k_cot_zeroshot", {"num_fewshot": 0, "max_gen_toks": None}),
        ("hendrycks_math", "hendrycks_math500", {"num_fewshot": None, "max_gen_toks": None}),
        ("minerva_math", "minerva_math500", {"num_fewshot": 4, "max_gen_toks": None}),
        ("ifeval", "ifeval", {"num_fewshot": 0, "max_gen_toks": 1280}),
        ("humaneval", "humaneval", {"unsafe_code": True, "max_gen_toks": 1024}),
        ("humaneval", "humaneval_instruct", {"unsafe_code": True, "max_gen_toks": 1024}),
        ("mbpp", "mbpp", {"unsafe_code": True, "num_fewshot": 3, "max_gen_toks": None}),
        ("mbpp", "mbpp_instruct", {"unsafe_code": True, "num_fewshot": 3, "max_gen_toks": 256}),
    ],
)
def test_the_benchmarks_that_we_name_are_lm_evals(folder, task, settings) -> None:
    """Their names and settings in docs/decoding-and-evaluation.md; their data is not loaded."""
    assert f"`{task}`" in (REPOSITORY / "docs" / "decoding-and-evaluation.md").read_text()
    folder, settings = Path(lm_eval.tasks.__file__).parent / folder, dict(settings)
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)  # of 14,000 files a few
    assert task in manager.all_tasks
    config = load_yaml(manager.task_index[task].yaml_path, resolve_func=False)
    assert config["output_type"] == "generate_until"
    found = config | config.get("generation_kwargs", {})
    assert settings.pop("until", "") in " ".join(found.get("until", []))
    assert {name: found.get(name) for name in settings} == settings


@pytest.mark.ray
def test_teacher_actors_stop_as_one_process_does(ray_cluster, chain_teacher) -> None:
    decoder = CheckpointDecoder(chain_teacher)
    requests = [replace(_request(decoder, i, LIMIT), stop=("5", "=")) for i in range(len(PROMPTS))]
    here = decoder.answer(requests, decoder.base, 2).responses
    assert any(0 < len(ids) < LIMIT for ids in here)
    with ActorDecoder(chain_teacher, actors=1) as actors:
        there = actors.answer(requests, actors.base, 2).responses
    assert [ids.tolist() for ids in there] == [ids.tolist() for ids in here]
