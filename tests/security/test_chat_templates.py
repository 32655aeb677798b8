"""A chat template cannot leave its sandbox. `pytest tests/security/test_chat_templates.py`"""

from __future__ import annotations

import pytest

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.chat import chat_prompt
from opdlm.common.data.prompts import load_prompts
from opdlm.common.errors import OpdlmError
from opdlm.common.model.tokenizer import load_tokenizer

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open'](MARKER, 'w') }}",
    "{{ cycler.__init__.__globals__.os.system('touch ' ~ MARKER) }}",
    "{{ ('{0.__class__.__mro__}').format(messages) }}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_that_tries_to_leave_its_sandbox_is_an_error_in_one_line(model, template, marker, tmp_path) -> None:
    (model / "chat_template.jinja").write_text(f"{{% set MARKER = {str(marker)!r} %}}{template}")
    tokenizer = load_tokenizer(model)
    with pytest.raises(OpdlmError, match="chat template: it tries to leave its sandbox") as caught:
        chat_prompt(tokenizer, "1+2=")
    assert "\n" not in str(caught.value)
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+2="}\n')
    data = DataConfig(path=str(tmp_path / "d.jsonl"), chat_template=True)
    with pytest.raises(OpdlmError, match="chat template: it tries to leave its sandbox"):
        load_prompts(data, tokenizer, 99, 0)
