"""Data: prompts to train on, questions to evaluate on, and the built-in tasks.

`read_rows` and `read_questions` read rows of a task, a file or a data set. `load_prompts` turns rows into token ids,
with `ChatTemplate` where the data are conversations, and `PromptOrder` says which prompt each sample of a run uses.
`ANSWER_CHECKS` compares responses with reference answers. The tasks are in `opdlm.common.data.tasks`. A public name is
imported with its module when it is first used, so that code that only uses a task does not load transformers.
"""

from __future__ import annotations

from opdlm.common.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "answers": [
            "ANSWER_CHECKS",
            "ANSWER_KINDS",
            "AnswerCheck",
            "AnswerKind",
            "answer_check",
            "contains_check",
            "exact_check",
            "math_check",
        ],
        "chat": ["ChatRefused", "ChatTemplate", "chat_prompt", "require_template"],
        "conversation": ["ROLES", "Conversation", "read_conversation"],
        "prompts": ["Prompt", "PromptOrder", "PromptSet", "load_prompts"],
        "records": ["read_records"],
        "rows": ["Question", "Row", "Text", "read_questions", "read_rows"],
        "unknown": ["UnknownCharacters"],
    },
)
