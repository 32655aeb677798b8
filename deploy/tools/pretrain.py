"""`opdlm pretrain`: trains with a progress bar, checks the result where a task knows the answers, saves."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opdlm.actors.teacher.generate import generate
from opdlm.common.data.tasks import get_task
from opdlm.common.errors import OpdlmError
from opdlm.common.model.char_tokenizer import build_char_tokenizer
from opdlm.common.model.convert import save_model
from opdlm.deploy.evaluate.during_run import HeldOutProblems
from opdlm.deploy.tools.pretraining import PretrainSettings, build_model, pretrain, task_batches, text_batches

_EXAM_PROBLEMS = 500


def run_pretrain(
    destination: Path, task_name: str | None, text: Path | None, settings: PretrainSettings, console: Console
) -> None:
    """Trains and writes a checkpoint in Hugging Face layout; the folder appears whole or not at all."""
    if (task_name is None) == (text is None):
        raise OpdlmError("pretrain: give exactly one of --task (e.g. chain) and --text FILE")
    if destination.exists():
        raise OpdlmError(f"pretrain: {destination} exists; give a new folder (nothing was written)")
    if settings.hidden_size % settings.heads:
        raise OpdlmError(
            f"pretrain: --hidden-size {settings.hidden_size} is not a multiple of --heads {settings.heads}"
        )
    task = get_task(task_name) if task_name else None
    if text is not None and not text.is_file():
        raise OpdlmError(f"pretrain: --text {text} does not exist")
    tokenizer = build_char_tokenizer(task.alphabet if task else text.read_text() if text else "")
    tokenizer.model_max_length = settings.context
    model = build_model(settings, tokenizer)
    batches = task_batches(task, tokenizer, settings) if task else text_batches(Path(str(text)), tokenizer, settings)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"training {parameters:,} parameters, vocabulary {len(tokenizer)}, {settings.steps} steps", highlight=False
    )
    every = max(settings.steps // 10, 1)
    with Progress(
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        row = bar.add_task("", total=settings.steps, loss=float("nan"))

        def progress(step: int, loss: float) -> None:
            bar.update(row, completed=step, loss=loss)
            if not console.is_terminal and step % every == 0:
                console.print(f"step {step}/{settings.steps} loss {loss:.4f}", highlight=False)

        pretrain(model, batches, settings, progress)
    if task is not None:
        exam = HeldOutProblems([task], tokenizer, _EXAM_PROBLEMS)
        responses = generate(model, exam.prompt_ids, settings.context // 2, [tokenizer.eos_token_id], 128)
        console.print(
            f"exact match on {_EXAM_PROBLEMS} held-out problems: {exam.exact_match(responses):.1%}", highlight=False
        )
    save_model(model, tokenizer, destination)
    console.print(f"written: {destination}", highlight=False)
