"""A script that reads model folders with one version of transformers, in a process that cannot import our packages.

`python -I reader.py JOB.json`: JOB has `transformers` (a folder to import it from, or null), `texts`, `chat`, `prompt`,
`ids`, `folders` (each a `path` and an `auto` class) and `out`, the folder for `read.json` and `logits.safetensors`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS = {"opdlm", "common", "actors", "learner", "deploy", "tests"}
CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"


def read_tokenizer(path: str, job: dict[str, Any]) -> dict[str, Any]:
    """What the folder's tokenizer does with the job's texts and chat."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    ids = [tokenizer(text)["input_ids"] for text in job["texts"]]
    templates = (
        tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {None: tokenizer.chat_template}
    )
    return {
        "keys": sorted(tokenizer(job["texts"][0])),
        "ids": ids,
        "bare_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]],
        "decoded": [tokenizer.decode(row) for row in ids],
        "without_special": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "chat": {
            str(name): tokenizer.apply_chat_template(
                job["chat"], tokenize=False, add_generation_prompt=True, chat_template=name
            )
            for name, template in templates.items()
            if template is not None
        },
        "special_ids": sorted(tokenizer.all_special_ids),
        "named": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")},
        "length": len(tokenizer),
    }


def refusal(auto: str, path: str, **how: Any) -> str | None:
    """The error of loading a folder with an Auto class; None where it loads."""
    import transformers

    try:
        getattr(transformers, auto).from_pretrained(path, **how)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def answers(model: Any, tokenizer: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Responses to prompts of several lengths, each alone, in a padded batch, and drawn with a seed."""
    import torch

    tokenizer.padding_side = "left"
    prompts = [job["prompt"], job["prompt"] * 3, job["prompt"][:2]]
    alone = []
    for prompt in prompts:
        encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        alone.append(model.generate(**encoded, max_new_tokens=9, threshold=0.3)[0].tolist())
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    padded, drawn = model.generate(**batch, max_new_tokens=9, threshold=0.3).tolist(), []
    for _ in range(2):
        torch.manual_seed(1)
        how = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
        drawn.append(model.generate(**batch, max_new_tokens=9, threshold=0.3, **how).tolist())
    before = [row.index(1) for row in batch["attention_mask"].tolist()]
    return {"alone": alone, "padded": [row[at:] for row, at in zip(padded, before, strict=True)], "drawn": drawn}


def piped(model: Any, tokenizer: Any, job: dict[str, Any]) -> list[str]:
    """What `pipeline("text-generation")` around the loaded model writes, greedily."""
    from transformers import pipeline

    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = [job["prompt"], job["prompt"] * 3]
    return [out[0]["generated_text"] for out in made(prompts, batch_size=2, max_new_tokens=9, do_sample=False)]


def read(folder: dict[str, Any], job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the test compares for one folder: facts that JSON holds, and logits by name."""
    import torch
    import transformers

    path, auto, found = folder["path"], folder["auto"], read_tokenizer(folder["path"], job)
    code = {} if folder["plain"] else {"trust_remote_code": True}
    model = getattr(transformers, auto).from_pretrained(path, **code).float()
    ids = torch.tensor([job["ids"]])
    seen = torch.tensor(job["mask"])[None, None]
    with torch.no_grad():
        logits = {"default": model(input_ids=ids).logits, "given": model(input_ids=ids, attention_mask=seen).logits}
    found |= {
        "rope_theta": getattr(model.config, "rope_theta", None) or model.config.rope_parameters["rope_theta"],
        "stops": model.generation_config.eos_token_id,
        "class": type(model).__name__,
    }
    if not folder["plain"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        encoded = tokenizer(job["prompt"], add_special_tokens=False, return_tensors="pt")
        found["decoded_answer"] = model.generate(**encoded, max_new_tokens=9, threshold=0.3)[0].tolist()
        found["batch_answers"] = answers(model, tokenizer, job)
        found["piped"] = piped(model, tokenizer, job)
    if auto == CAUSAL and code:
        made = transformers.pipeline("text-generation", model=path, trust_remote_code=True)
        found["piped_from_folder"] = made(job["prompt"], max_new_tokens=9, do_sample=False)[0]["generated_text"]
    if auto == MASKED:
        found["causal"] = refusal(CAUSAL, path, trust_remote_code=True)
    if not folder["plain"]:
        found["untrusted"] = {name: refusal(name, path) for name in (CAUSAL, MASKED)}
    return found, logits


def main(job: dict[str, Any]) -> None:
    if job["transformers"] is not None:
        sys.path.insert(0, job["transformers"])
    import transformers
    from safetensors.torch import save_file

    found, logits = {"version": transformers.__version__}, {}
    for folder in job["folders"]:
        name = Path(folder["path"]).name
        try:
            found[name], of_folder = read(folder, job)
        except Exception as error:
            raise RuntimeError(f"{name} with transformers {transformers.__version__}") from error
        logits |= {f"{name}/{key}": value.contiguous() for key, value in of_folder.items()}
    assert not OURS & {module.partition(".")[0] for module in sys.modules}
    save_file(logits, Path(job["out"]) / "logits.safetensors")
    (Path(job["out"]) / "read.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
