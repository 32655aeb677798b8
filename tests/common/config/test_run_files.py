"""Run files as people write them: keys twice, home folders, numbers of a wrong form.

`pytest tests/common/config/test_run_files.py`
"""

from __future__ import annotations

from pathlib import Path

import pytest

from opdlm.common.config import OpdlmConfig, load_config
from opdlm.common.curriculum import unused_domain_limits
from opdlm.common.errors import ConfigError

BASE = "model: {teacher: t}\ndata: {path: p.jsonl}\n"


def load(folder: Path, text: str, *overrides: str) -> OpdlmConfig:
    (folder / "run.yaml").write_text(BASE + text)
    return load_config(folder / "run.yaml", overrides)


def refused(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {seed: 1}\nlearner: {}\nrun: {dir: a}", "line 5: `run` is there twice, first in line 3; keep one"),
        (
            "learner:\n  optimizer:\n    lr: 1.0\n    eps: 1.0\n    lr: 2.0",
            "line 7: `lr` is there twice, first in line 5",
        ),
        ("run: {dir: a, 'dir': b}", "line 3: `dir` is there twice, first in line 3"),
        ("data: {task: chain}", "line 3: `data` is there twice, first in line 2"),
        ("run:\n\tdir: a", "line 4: found character '\\t' that cannot start any token; indent with spaces, not with"),
        ("---\nrun: {}", "line 3: a second document begins; keep one"),
        ("run: [a", "line 3: "),
        ("run: " + "[" * 5000, "nested too deeply"),
        ("run: {seed: " + "9" * 5000 + "}", "a number has more than 4,300 digits"),
        ("run: {dir: 2024-13-45}", "month must be in 1..12"),
    ],
)
def test_yaml_that_is_wrong_or_would_lose_a_value(tmp_path, text, message) -> None:
    found = refused(tmp_path, text)
    assert found.startswith(f"run file: {tmp_path}/run.yaml is not YAML: ")
    assert message in found


def test_merge_keys_may_be_overridden(tmp_path) -> None:
    """A key beside `<<` is not there twice, whichever mapping is built first."""
    text = (
        "rollout: &a {batch_size: 7, block_size: 8}\n"
        "teacher: {placement: &b {group: pack}}\n"
        "learner: {placement: &c {<<: *b, group: spread}, optimizer: {lr: 1.0e-3}}\n"
    )
    config = load(tmp_path, text)
    assert config.learner.placement.group == "spread"
    nested = text + "evaluation: {batch_size: 3}\n"
    assert load(tmp_path, nested.replace("{<<: *b, group", "{<<: [*b], group")).learner.placement.group == "spread"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.seed=1", "run.dir=a", "run.seed=1"], "--set run.seed: it is given twice; leave one out"),
        (["run.seed=1", "run={dir: a}"], "--set run: it would undo --set run.seed; leave one out"),
        (["run={dir: a, dir: b}"], "--set run={dir: a, dir: b}: the value is not YAML: line 1: `dir` is there twice"),
        (["run.seed=" + "9" * 5000], "...: the value is not YAML: a number has more than 4,300 digits"),
        (["run.dir=\udcff"], "the value is not YAML: unacceptable character"),
    ],
)
def test_overrides_that_are_wrong_or_would_lose_a_value(tmp_path, overrides, message) -> None:
    assert message in refused(tmp_path, "", *overrides)


def test_an_override_may_refine_an_earlier_one(tmp_path) -> None:
    assert load(tmp_path, "", "model.lora={}", "model.lora.rank=4").model.lora.rank == 4


def test_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = ["run.dir=~/runs/x", "model.teacher=~/t", "model.student=~/s", "data.path=~/d.jsonl"]
    config = load(tmp_path, "offline: {cache: ~/c.parquet}\nrun: {replay: ~/r}", *settings)
    paths = [config.offline.cache, config.run.replay, config.run.dir, config.model.teacher, config.model.student]
    assert [*paths, config.data.path] == [f"{tmp_path}/{n}" for n in ("c.parquet", "r", "runs/x", "t", "s", "d.jsonl")]
    (tmp_path / "mine.yaml").write_text(BASE)
    assert load_config("~/mine.yaml").model.teacher == "t"
    message = refused(tmp_path, "run: {dir: ~nobody-here/x}")
    assert (
        "run.dir: ~nobody-here/x: there is no home folder ~nobody-here; write ./~nobody-here/x for a folder" in message
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollout: {batch_size: true}", "rollout.batch_size: input should be a number; found True"),
        (
            "rollout: {batch_size: 1.5}",
            "rollout.batch_size: input should be a valid integer, got a number with a fract",
        ),
        ("rollout: {batch_size: .nan}", "rollout.batch_size: input should be a finite number; found nan"),
        ("rollout: {batch_size: .inf}", "rollout.batch_size: input should be a finite number; found inf"),
        ("rollout: {threshold: true}", "rollout.threshold: input should be a number; found True"),
        ("rollout: {threshold: .nan}", "rollout.threshold: input should be a finite number; found nan"),
        ("rollout: {temperature: .inf}", "rollout.temperature: input should be a finite number; found inf"),
        ("rollout: {temperature: 'nan'}", "rollout.temperature: input should be a finite number; found 'nan'"),
        ("rollout: {temperature: 1.0e+400}", "rollout.temperature: input should be a finite number; found inf"),
        ("rollout: {gpus_per_actor: .inf}", "rollout.gpus_per_actor: input should be a finite number"),
        (
            "learner: {optimizer: {betas: [0.9, 1.0]}}",
            "learner.optimizer.betas[1]: input should be less than 1; found 1",
        ),
        (
            "learner: {optimizer: {betas: [1.5, 0.9]}}",
            "learner.optimizer.betas[0]: input should be less than 1; found 1",
        ),
        ("learner: {optimizer: {betas: [true, 0.9]}}", "learner.optimizer.betas[0]: input should be a number; found T"),
        ("learner: {optimizer: {lr: -1}}", "learner.optimizer.lr: input should be greater than 0; found -1"),
        ("learner: {optimizer: {lr: .nan}}", "learner.optimizer.lr: input should be a finite number; found nan"),
        ("learner: {zero: {stage: true}}", "learner.zero.stage: input should be a number; found True"),
        ("curriculum: {threshold: {start: .inf}}", "curriculum.threshold.start: input should be a finite number"),
        (
            "curriculum: {max_new_tokens_per_domain: {math: true}}",
            "max_new_tokens_per_domain.math: input should be a n",
        ),
        ("teacher: {placement: {node_resources: {a: .inf}}}", "node_resources.a: input should be a finite number"),
        ("resources: {call_timeout_seconds: .inf}", "resources.call_timeout_seconds: input should be a finite number"),
        ("run: {deterministic: 1}", "run.deterministic: input should be a valid boolean (true or false); found 1"),
        ("run: {deterministic: 'yes'}", "run.deterministic: input should be a valid boolean (true or false); found 'y"),
        ("run: {dir: 2024}", 'run.dir: input should be a valid string (write it in quotes: "..."); found 2024'),
        ("run: {dir: yes}", 'run.dir: input should be a valid string (write it in quotes: "..."); found True'),
        ("run: {dir: ''}", "run.dir: string should have at least 1 character; found ''"),
        ('run: {dir: "a\\0b"}', "run.dir: 'a\\x00b' holds a NUL character (character 2); correct the text"),
        ('data2: "\\ud800"', "data2: unknown key; did you mean `data`?"),
        ("run: {seed: 18446744073709551616}", "run.seed: input should be at most 18446744073709551615, the largest nu"),
        ("run: {seed: -1}", "run.seed: input should be greater than or equal to 0; found -1"),
    ],
)
def test_values_of_a_wrong_form_are_named(tmp_path, text, message) -> None:
    assert message in refused(tmp_path, text)


def test_numbers_may_be_written_in_any_form_that_means_them(tmp_path) -> None:
    config = load(
        tmp_path, "rollout: {batch_size: 1e3, block_size: 8.0, temperature: 1}\nlearner: {optimizer: {lr: 1e-4}}"
    )
    assert (config.rollout.batch_size, config.rollout.block_size, config.rollout.temperature) == (1000, 8, 1.0)
    assert config.learner.optimizer.lr == 1e-4
    assert load(tmp_path, "run: {seed: 18446744073709551615}").run.seed == 2**64 - 1


def test_other_things_than_a_mapping(tmp_path) -> None:
    for text in ("- a\n", "[]", "a"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ConfigError, match="expected sections such as `model:`"):
            load_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="is a folder; give a YAML file"):
        load_config(tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match=r"run file: .*run.yaml is not text: 'utf-8' codec"):
        load_config(tmp_path / "run.yaml")


def test_an_error_about_a_huge_value_is_short(tmp_path) -> None:
    """A few lines of anchors can stand for billions of values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert len(refused(tmp_path, f"run: {{dir: {{{', '.join(lines)}}}}}")) < 2000


def test_limits_for_domains_that_no_row_has(tmp_path) -> None:
    config = load(tmp_path, "curriculum: {max_new_tokens_per_domain: {maths: 7, code: 9}}")
    line = unused_domain_limits(config, {"math", "code", None})
    assert line == (
        "curriculum.max_new_tokens_per_domain: no row has the domain maths; the rows' domains are code, math; "
        "did you mean `math`?"
    )
    assert "no row has the domain code, maths; no row has a domain" in str(unused_domain_limits(config, {None}))
    assert unused_domain_limits(config, {"maths", "code"}) is None
