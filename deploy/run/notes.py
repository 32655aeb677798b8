"""What the user should know before a run starts, although it can start."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from opdlm.common.config import OpdlmConfig
from opdlm.common.model.device import multiplies_bfloat16
from opdlm.common.model.end_tokens import token_names
from opdlm.common.model.facts import ModelFacts


def end_token_notes(teacher: ModelFacts, student: ModelFacts, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Says where files name different end-of-sequence tokens: those of one folder, or teacher and student.

    The student decodes, so its end tokens are the run's.
    """
    notes = [note for note in dict.fromkeys((teacher.end_tokens_note, student.end_tokens_note)) if note]
    if teacher.eos_ids != student.eos_ids:
        ours, theirs = (token_names(facts.eos_ids, tokenizer) for facts in (student, teacher))
        notes.append(
            f"end tokens: the teacher {teacher.folder} has {theirs}; the student {student.folder} has {ours}, and the "
            f"run takes the student's; to change them, set eos_token_id in {student.folder}/generation_config.json"
        )
    return notes


def slow_bfloat16_notes(config: OpdlmConfig, capability: str) -> list[str]:
    """Says that processes without a GPU compute in bfloat16, where this machine's CPU has no arithmetic for it.

    `capability`: of the CPU, as of `torch.backends.cpu.get_cpu_capability()`.
    """
    asked = (
        ("model.dtype", config.model.dtype, min(config.rollout.gpus_per_actor, config.learner.gpus_per_worker)),
        ("teacher.dtype", config.teacher.dtype, config.teacher.gpus_per_actor if config.starts_teachers else 1.0),
    )
    slow = [name for name, dtype, gpus in asked if dtype == "bfloat16" and gpus == 0]
    if not slow or multiplies_bfloat16(capability):
        return []
    return [
        f"{' and '.join(slow)}: found `bfloat16` on CPUs; this machine's has no AVX-512 and multiplies float32 "
        "several times as fast: give `float32`"
    ]
