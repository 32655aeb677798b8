"""Students and AR checkpoints as a model of lm-eval (EleutherAI's evaluation harness), under the name `opdlm`.

Importing this module registers it. lm-eval 0.4.13 looks up models in a list of its own and loads no plug-ins, so its
plain `lm_eval` command cannot know of ours; `opdlm lm-eval` is that command with this module imported.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.stopping import StopStrings
from opdlm.common.batches import in_groups
from opdlm.common.config.schema import Strategy
from opdlm.common.data.chat import chat_prompt, require_template
from opdlm.common.errors import OpdlmError
from opdlm.common.files import home_path, read_text
from opdlm.common.model.hub import model_folder
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.decoders import CheckpointDecoder, Decoder
from opdlm.deploy.evaluate.lm_eval_likelihood import BOUND_SAMPLES, Likelihoods

_BATCHES_A_CALL = 8
"""Batches per update of the progress bar and of lm-eval's response cache."""


@register_model("opdlm")
class OpdlmLM(Likelihoods, LM):
    """`generate_until` with the block decoder, or token by token for an AR checkpoint, and likelihoods of students.

    Args (lm-eval's `model_args`):
        pretrained: checkpoint folder or hub id; or, from Python, a `Decoder`.
        strategy: remasking strategy. None: the student's own (`ModelFacts.usual_strategies`).
        threshold: confidence threshold of the dynamic strategies.
        block_size: None takes the checkpoint's own, else 4.
        batch_size: sequences decoded side by side; it overrides `--batch_size`, whose default is 1.
        max_new_tokens: longest response where neither the task nor `--gen_kwargs` sets `max_gen_toks`.
        chat_template: Jinja file that replaces the tokenizer's template.
        enable_thinking: passed to the template.
        seed: seed of sampling, for tasks that sample.
        device: by default cuda if there is one.
        likelihood: `bound` lets a lower bound stand for the likelihoods of a student, which `likelihood_samples`
            samples estimate. A lossless student's likelihoods are exact without it.

    Raises:
        OpdlmError: names an unknown argument, or one with an impossible value.
    """

    def __init__(
        self,
        pretrained: str | Decoder | None = None,
        strategy: Strategy | None = None,
        threshold: float = 0.9,
        block_size: int | None = None,
        batch_size: int | str = 64,
        max_new_tokens: int = 256,
        chat_template: str | None = None,
        enable_thinking: bool | None = None,
        seed: int = 0,
        device: str | None = None,
        likelihood: str | None = None,
        likelihood_samples: int = BOUND_SAMPLES,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if likelihood not in (None, "bound"):
            raise OpdlmError(f"model_args: likelihood: found {likelihood!r}; known: bound")
        self.likelihood, self.bounds = likelihood, []
        self.likelihood_samples = _count("likelihood_samples", likelihood_samples)
        _check_arguments(unknown, strategy, threshold)
        # lm-eval's `--batch_size` comes as text.
        self.batch_size = _count("batch_size", int(batch_size) if str(batch_size).isdigit() else batch_size)
        self.max_new_tokens = _count("max_new_tokens", max_new_tokens)
        block_size = None if block_size is None else _count("block_size", block_size)
        if pretrained is None:
            raise OpdlmError(
                "model_args: pretrained: missing; give a checkpoint folder, as pretrained=runs/demo/student"
            )
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm-eval's default is cuda:0, whatever is there
        self.decoder = (
            pretrained
            if isinstance(pretrained, Decoder)
            else CheckpointDecoder(model_folder(pretrained, "model_args: pretrained"), block_size, device)
        )
        strategy = strategy or self.decoder.facts.usual_strategies[-1]
        self.settings = replace(self.decoder.base.greedy(strategy), threshold=float(threshold))
        self.seed, self._thinking, self._templated = seed, enable_thinking, False
        self._tokens = self._steps = 0
        self._seconds = 0.0
        if chat_template is not None:
            file = Path(home_path(chat_template))
            if not file.is_file():
                raise OpdlmError(f"model_args: chat_template: {file} does not exist; expected a Jinja file")
            self.decoder.tokenizer.chat_template = read_text(file)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> OpdlmLM:
        """Makes one from `model_args`, which override lm-eval's own options (`--batch_size`, `--device`)."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**given | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> OpdlmLM:
        """The same from `key=value,key=value`."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # --- generation ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Responses as text, cut before the first stop string of the request's `until`, with whose block a student's
        response ends."""
        groups: dict[str, list[RolloutRequest]] = defaultdict(list)
        until: list[list[str]] = []
        for i, instance in enumerate(requests):
            context, given = instance.args
            how = dict(normalize_gen_kwargs(given, self.max_new_tokens))
            until.append(how.pop("until"))
            limit, ids = int(how.pop("max_gen_toks")), self.decoder.encode(context, self._templated)
            name = f"{instance.task_name} document {instance.doc_id}"
            request = RolloutRequest(i, name, ids, limit, seed=self.seed + i, stop=tuple(filter(None, until[-1])))
            groups[json.dumps(how, sort_keys=True)].append(request)
        settings = {
            key: self._settings(json.loads(key)) for key in groups
        }  # checks all of them before the first is decoded
        for group in groups.values():
            self.decoder.check_room(group)
        texts = [""] * len(requests)
        size = _BATCHES_A_CALL * self.batch_size * self.decoder.parallel
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for key, group in groups.items():
                for part in in_groups(group, size):
                    answers = self.decoder.answer(part, settings[key], self.batch_size)
                    self._tokens, self._steps = self._tokens + answers.tokens, self._steps + answers.denoising_steps
                    self._seconds += answers.seconds
                    for request, ids in zip(part, answers.responses, strict=True):
                        text = texts[request.index] = self._text(ids, until[request.index])
                        self.cache_hook.add_partial("generate_until", requests[request.index].args, text)
                    bar.update(len(part))
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """The way and the speed of decoding, which lm-eval writes beside its results."""
        return {
            "pretrained": str(self.decoder.folder),
            "decoding": self.settings.strategy if self.decoder.is_student else "autoregressive",
            "threshold": self.settings.threshold,
            "block_size": self.settings.block_size,
            "block_grid": self.settings.block_grid,
            "tokens_per_step": self._tokens / self._steps if self._steps else None,
            "tokens_per_second": self._tokens / self._seconds if self._steps else None,
            **self.likelihood_info(),
        }

    # --- chat templates, as lm-eval asks for them ---------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of lm-eval's request cache: the tokenizer and its template by content, not by folder."""
        tokenizer = self.decoder.tokenizer
        content = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, self._thinking)
        return f"{self.decoder.folder.resolve().name}-{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use; None where lm-eval asks for none."""
        self._templated = bool(chat_template)
        name = chat_template if isinstance(chat_template, str) else None
        return require_template(self.decoder.tokenizer, name) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a generation prompt the assistant's last message is continued."""
        self._templated = True  # lm-eval puts either all contexts through the template or none
        return chat_prompt(self.decoder.tokenizer, chat_history, self._thinking, not add_generation_prompt)

    # --- details ------------------------------------------------------------------------------------------------

    def _settings(self, how: dict[str, Any]) -> DecodeSettings:
        sampled = bool(how.pop("do_sample", False))
        temperature, top_k, top_p = how.pop("temperature", 1.0), how.pop("top_k", 0), how.pop("top_p", 1.0)
        if not sampled:
            temperature, top_k, top_p = 0.0, 0, 1.0
        if how:
            raise OpdlmError(
                f"gen_kwargs: {', '.join(sorted(how))}: not supported; known: until, max_gen_toks, do_sample, "
                "temperature, top_k, top_p"
            )
        if not self.decoder.is_student and (top_k, top_p) != (0, 1.0):
            raise OpdlmError(f"gen_kwargs: {self.decoder.folder} is autoregressive; it samples without top_k and top_p")
        return replace(self.settings, temperature=temperature, top_k=_whole("top_k", top_k), top_p=top_p)

    def _text(self, ids: np.ndarray, until: list[str]) -> str:
        ids = StopStrings(self.decoder.tokenizer).cut(until, ids)
        return postprocess_generated_text(self.decoder.text(ids), until, None)


def _check_arguments(unknown: dict[str, Any], strategy: Any, threshold: Any) -> None:
    known = [name for name in inspect.signature(OpdlmLM).parameters if name != "unknown"]
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
        raise OpdlmError(f"model_args: {name}: unknown; {hint}")
    if strategy is not None and strategy not in get_args(Strategy):
        raise OpdlmError(f"model_args: strategy: found {strategy!r}; known: {', '.join(get_args(Strategy))}")
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise OpdlmError(f"model_args: threshold: found {threshold!r}; expected a number within 0 and 1")


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise OpdlmError(f"model_args: {name}: found {value!r}; expected a whole number from 1")
    return value


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0 or value != int(value):
        raise OpdlmError(f"gen_kwargs: {name}: found {value!r}; expected a whole number from 0")
    return int(value)
