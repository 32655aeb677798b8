"""lm-eval's requests for likelihoods. `pytest tests/deploy/evaluate/test_lm_eval_likelihood.py`"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.deploy.evaluate.lm_eval_model import OpdlmLM
from tests.tiny import save_lossless


@pytest.fixture(scope="module")
def student(chain_teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("likelihood") / "student"
    convert_checkpoint(chain_teacher, folder, 4, "absolute")
    return folder


@pytest.fixture(scope="module")
def lossless(chain_teacher, tmp_path_factory) -> Path:
    """A student whose random adapters act on noisy tokens alone."""
    return save_lossless(chain_teacher, tmp_path_factory.mktemp("lossless"))


def choices(pairs: list[tuple[str, ...]], kind: str = "loglikelihood") -> list[Instance]:
    """Requests for likelihoods as lm-eval builds them."""
    return [Instance(kind, {}, pair, i, metadata=("chain_choice", i, 1)) for i, pair in enumerate(pairs)]


PAIRS = [("1+2=", "3;"), ("1+2= ", "44"), ("", "7+7")]


def test_a_lossless_students_likelihoods_are_its_teachers(lossless, chain_teacher) -> None:
    """lm-eval's own model of transformers says the same of the teacher."""
    ours, theirs = OpdlmLM(str(lossless), batch_size=2), HFLM(str(chain_teacher), device="cpu", batch_size=2)
    found, expected = (m.loglikelihood(choices(PAIRS[:2]), disable_tqdm=True) for m in (ours, theirs))
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-3)
    texts = choices([("1+2=3;4",), ("9" * 150,)], "loglikelihood_rolling")  # the second is longer than the context
    found, expected = (m.loglikelihood_rolling(texts, disable_tqdm=True) for m in (ours, theirs))
    assert found[0] == pytest.approx(expected[0], abs=1e-3)
    assert found[1] < found[0]
    with pytest.raises(OpdlmError, match="is a lossless student, whose likelihoods are its teacher's, exactly"):
        OpdlmLM(str(lossless), likelihood="bound").loglikelihood(choices(PAIRS), disable_tqdm=True)


def test_a_bound_stands_for_a_students_likelihoods_where_it_is_asked_for(student) -> None:
    model = OpdlmLM(str(student), likelihood="bound", likelihood_samples=64)
    found = model.loglikelihood(choices(PAIRS), disable_tqdm=True)
    assert found == OpdlmLM(str(student), likelihood="bound", likelihood_samples=64).loglikelihood(choices(PAIRS))
    assert all(total < 0 and not is_greedy for total, is_greedy in found)
    info = model.get_model_info()
    assert (info["likelihood"], info["likelihood_samples"]) == ("lower bound", 64)
    assert info["likelihood_stderr"] == pytest.approx(np.mean([bound.stderr for bound in model.bounds]))
    with pytest.raises(OpdlmError, match="loglikelihood_rolling, which a lower bound does not answer"):
        model.loglikelihood_rolling(choices([("1",)]), disable_tqdm=True)
    with pytest.raises(OpdlmError, match="likelihood: found 'exact'; known: bound"):
        OpdlmLM(str(student), likelihood="exact")
    with pytest.raises(OpdlmError, match="chain_choice document 0: a text takes 1004 positions"):
        model.loglikelihood(choices([("1+" * 500, "3")]), disable_tqdm=True)


def test_likelihoods_are_refused_with_the_reason(student, chain_teacher) -> None:
    for method in ("loglikelihood", "loglikelihood_rolling"):
        with pytest.raises(OpdlmError, match=f"asks for {method}, but a block-diffusion model gives no exact sequence"):
            getattr(OpdlmLM(str(student)), method)([])
        with pytest.raises(OpdlmError, match=f"--model hf --model_args pretrained={chain_teacher}"):
            getattr(OpdlmLM(str(chain_teacher)), method)([])
