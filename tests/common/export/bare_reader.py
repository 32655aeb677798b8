"""A script that loads exported folders with transformers, in a process that cannot import our packages.

`python -I bare_reader.py JOB.json` reads `{"inputs": FILE, "folders": [{"path", "auto"}], "out": FILE}`, writes logits,
losses and decoded tokens as safetensors, and runs the code of each folder's model card.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

OURS = {"opdlm", "common", "actors", "learner", "deploy", "tests"}


class Refuse:
    """An import hook that refuses our packages."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ImportError(f"{name} was imported by an exported folder")


def read(folder: dict, tensors: dict) -> dict:
    """Computes what the test compares for one folder: logits, losses, decoded tokens."""
    import torch
    import transformers

    auto = getattr(transformers, folder["auto"])
    found = {}
    for implementation in ("sdpa", "eager"):
        model = auto.from_pretrained(
            folder["path"], trust_remote_code=True, attn_implementation=implementation, dtype=torch.float32
        )
        with torch.no_grad():
            for name in ("whole", "left", "right"):
                padding = None if name == "whole" else tensors[f"{name}.padding"]
                output = model(input_ids=tensors[f"{name}.ids"], attention_mask=padding)
                found[f"{implementation}.{name}"] = output.logits
            given = tensors["given.mask"]
            if implementation == "eager":  # this implementation adds the mask to the scores
                given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
            output = model(
                input_ids=tensors["whole.ids"], attention_mask=given, position_ids=tensors["given.positions"]
            )
            found[f"{implementation}.given"] = output.logits
            past = model(input_ids=tensors["whole.ids"][:, :8], use_cache=True).past_key_values
            found[f"{implementation}.cached"] = model(
                input_ids=tensors["whole.ids"][:, 8:], past_key_values=past
            ).logits
            labels = tensors["whole.ids"].clone()
            labels[:, ::2] = -100
            found[f"{implementation}.loss"] = model(input_ids=tensors["whole.ids"], labels=labels).loss
    found |= decode(model, tensors)
    if model.config.model_type == "sdar":  # SGLang reads these attributes
        factor = (model.config.rope_scaling or {}).get("factor", 1.0)
        found["config"] = torch.tensor([model.config.rope_theta, factor])
    return {key: value.contiguous() for key, value in found.items()}


def decode(model, tensors: dict) -> dict:
    """Responses to all prompts in one padded batch, to one prompt alone, and sampled ones."""
    import torch

    prompts = [value[0] for key, value in sorted(tensors.items()) if key.startswith("prompt.")]
    width = max(len(prompt) for prompt in prompts)
    batch = {
        "input_ids": torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0), value=1) for ids in prompts]),
        "attention_mask": torch.stack([(torch.arange(width) >= width - len(ids)).long() for ids in prompts]),
    }
    found = {"alone": model.generate(prompts[0][None], max_new_tokens=9, threshold=0.3)}
    for limit, threshold, read_at_once in ((9, 0.3, 512), (5, 1.0, 8)):
        model.prefill_tokens = read_at_once
        found[f"decode.{limit}"] = model.generate(**batch, max_new_tokens=limit, threshold=threshold)
    found["in_order"] = model.generate(**batch, max_new_tokens=9, threshold=0.3, strategy="sequential_dynamic")
    for name, seed, how in (
        ("drawn", 3, {"temperature": 2.0}),
        ("again", 3, {"temperature": 2.0}),
        ("other", 4, {"temperature": 2.0}),
        ("top_k", 4, {"top_k": 1}),
        ("top_p", 4, {"top_p": 1e-6}),
    ):
        torch.manual_seed(seed)
        found[name] = model.generate(**batch, max_new_tokens=9, threshold=0.3, do_sample=True, **how)
    errors = []
    for wrong in (
        {"num_beams": 4},
        {"attention_mask": batch["attention_mask"].flip(1)},
        {"max_new_tokens": 1000},
        {"threshold": 3.0},
        {"input_ids": None},
        {"strategy": "static"},
    ):
        try:
            model.generate(**(batch | wrong))
        except ValueError as error:
            errors.append(str(error))
    assert [error.split()[1].strip(":") for error in errors[:2]] == ["num_beams", "attention_mask"], errors
    assert ["context" in error for error in errors] == [False, False, True, False, False, False], errors
    assert len(errors) == 6
    return found


def run_card(folder: Path) -> None:
    """Runs the Python code of the model card, as its reader would."""
    script = folder / "card.py"
    script.write_text(re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1))
    print(f"card of {folder.name}:")
    runpy.run_path(str(script))


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())
    import os

    from safetensors.torch import load_file, save_file

    job = json.loads(Path(sys.argv[1]).read_text())
    inputs, results = load_file(job["inputs"]), {}
    for item in job["folders"]:
        where = Path(item["path"])
        if item["auto"] is not None:
            results |= {f"{where.name}/{key}": value for key, value in read(item, inputs).items()}
        os.chdir(where)
        run_card(where)
    assert not OURS & {name.partition(".")[0] for name in sys.modules}
    save_file(results, job["out"])
