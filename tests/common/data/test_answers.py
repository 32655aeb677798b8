"""Checks of responses against reference answers, with math-verify itself. `pytest tests/common/data/test_answers.py`"""

from __future__ import annotations

import sys
import threading

import pytest

from opdlm.common.data.answers import answer_check, contains_check, exact_check, math_check
from opdlm.common.errors import OpdlmError


def test_exact_compares_text_without_white_space_at_the_ends() -> None:
    check = exact_check(" 47+8=55;55 \n")
    assert check("47+8=55;55") is True
    assert check("47+8=55; 55") is False


@pytest.mark.parametrize(
    ("reference", "response", "verdict"),
    [
        ("Paris", "The capital is **PARIS**.", True),
        ("Paris", "Parisian food", False),
        ("4", "14", False),
        ("4", "That is 4.5 kg", False),
        ("4", "10-6=4", True),
        ("4", "It is -4.", False),
        ("-4", "It is -4.", True),
        ("4", "4.0", True),
        ("1000", "about 1,000 grams", True),
        ("100", "about 1,000 grams", False),
        ("New York", "in new  york!", True),
        ("New York", "York is new", False),
        ("twenty-four", "Twenty four hours", True),
        ("Bogotá", "It is Bogota", True),
        ("Côte d'Ivoire", "the COTE D\u2019IVOIRE", True),
        ("H2O", "H₂O is water", True),
        ("Paris", "", False),
    ],
)
def test_contains_looks_for_whole_words(reference, response, verdict) -> None:
    assert contains_check(reference)(response) is verdict


def test_any_accepted_answer_is_right() -> None:
    check = answer_check("contains", ["USA", "United States"])
    assert check("the United States, of course") is True
    assert check("the united nations") is False
    check = answer_check("math", ["2", "3"])
    assert [check("it is 3"), check("it is 4"), check("none")] == [True, False, None]
    with pytest.raises(ValueError, match=r"found '\?!', which has no word; expected a word or a number"):
        answer_check("contains", ["USA", "?!"])


@pytest.mark.parametrize(
    ("reference", "response", "verdict"),
    [
        ("0.5", r"so it is \boxed{1/2}.", True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"The sum is \boxed{0.5}", "the answer is 1/2", True),
        ("(3, \\frac{\\pi}{2})", r"$r = 3$, so \boxed{\left(3, \frac{\pi}{2}\right)}", True),
        ("1000", "That makes 1,000 in all.", True),
        ("52", "47+8=55;55-3=52;52", True),
        ("0.5", r"\boxed{1/3}", False),
        ("2", r"first \boxed{1}, no: \boxed{2}", True),
        ("1", r"first \boxed{1}, no: \boxed{2}", False),
        ("2", r"1 + 1 = 2, so \boxed{3}", False),
        ("2", r"of 2 and 3 I take \boxed{", None),
        ("2", "I do not know.", None),
        ("2", "", None),
    ],
)
def test_math_compares_values(reference, response, verdict) -> None:
    assert math_check(reference)(response) is verdict


def test_a_reference_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="math-verify reads no answer in ''"):
        math_check("")


def test_without_the_package_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(OpdlmError, match=r"marking by `math` needs math-verify: pip install 'opdlm-ray\[eval\]'"):
        math_check("2")


def test_outside_the_main_thread_the_math_check_raises_an_error() -> None:
    """math-verify's time limit needs the main thread; without the error, every answer would count as wrong."""
    check, caught = math_check("2"), []

    def run() -> None:
        try:
            check("2")
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "thread" in caught[0]
