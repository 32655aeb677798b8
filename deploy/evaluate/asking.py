"""What `opdlm eval` does with its questions: every way of decoding, the teacher beside it, tables and samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from opdlm.actors.teacher.scoring import score
from opdlm.common.batches import in_groups
from opdlm.common.config.schema import Selection, Strategy
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.facts import check_vocabularies, require_mask
from opdlm.common.model.tokenizer import check_tokenizers
from opdlm.common.types import RolloutRequest, ScoredTrajectory, Trajectory
from opdlm.deploy.evaluate.decoders import Answers, CheckpointDecoder, Decoder
from opdlm.deploy.evaluate.known_answers import choose_evenly
from opdlm.deploy.evaluate.options import DecodingOptions
from opdlm.deploy.evaluate.partings import partings
from opdlm.deploy.evaluate.questions import Questions
from opdlm.deploy.evaluate.reranked import rerank_figures
from opdlm.deploy.observe.meter import Meter
from opdlm.deploy.observe.tables import decoding_name, new_table

AUTOREGRESSIVE = "autoregressive, greedy"
TEACHER = "teacher"
_SCORED_AT_ONCE = 64
_SCORE_TOKENS = 4096
"""Most tokens in one forward of the teacher."""


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """The ways of decoding that `opdlm eval` compares, and where its results go."""

    strategies: tuple[Strategy, ...]
    """Empty: the checkpoint's usual ones."""
    threshold: float
    block_size: int | None
    """None: what the checkpoint says, else 4."""
    output: Path | None = None
    teacher: Path | None = None
    """Folder of an autoregressive model that answers first, and beside which the checkpoint's figures are shown."""
    samples: int = 0
    """Number of questions whose answers are shown side by side."""
    beside: Path | None = None
    """Results of another checkpoint, as `output` has them, whose re-ranking is compared with this one's."""
    prompt_lookup: int = 0
    """Above 0, the autoregressive model also answers with drafts of so many tokens that it has read before."""


def check_in_process(options: EvalOptions, decoding: DecodingOptions) -> None:
    """Raises `OpdlmError` for actors beside what needs the models in this process."""
    if not decoding.actors:
        return
    found = f"found with --actors {decoding.actors}"
    if options.teacher is not None:
        raise OpdlmError(f"--teacher: {found}; the KL needs both models in this process, so give --actors 0")
    if options.prompt_lookup:
        raise OpdlmError(f"--prompt-lookup: {found}; it is measured in this process, so give --actors 0")


def open_teacher(folder: Path, decoder: Decoder, decoding: DecodingOptions) -> CheckpointDecoder:
    """Loads the teacher that a checkpoint is compared with.

    Raises:
        OpdlmError: it is no autoregressive model, or its tokens are not the checkpoint's.
    """
    teacher = CheckpointDecoder(folder, dtype=decoding.dtype)
    if teacher.is_student:
        raise OpdlmError(f"--teacher: {folder} is a student; give the autoregressive model that it was made from")
    check_vocabularies(teacher.facts, decoder.facts)
    check_tokenizers(teacher.facts, decoder.facts)
    return teacher


class Evaluation:
    """Answers questions with a checkpoint in several ways, and with a teacher where one is given; marks all answers."""

    def __init__(
        self,
        decoder: Decoder,
        questions: Questions,
        options: EvalOptions,
        decoding: DecodingOptions,
        teacher: CheckpointDecoder | None,
    ) -> None:
        self._decoder, self.questions, self._teacher = decoder, questions, teacher
        self._options, self._decoding = options, decoding
        if options.prompt_lookup and decoder.is_student and teacher is None:
            raise OpdlmError(
                f"--prompt-lookup: {decoder.folder} is a student; prompt lookup is for an autoregressive model, so "
                "give one as CKPT or --teacher"
            )
        self._meter: Meter | None = None
        self._texts: dict[str, list[str]] = {}
        """By way of decoding, the text of each response."""

    def rows(self, meter: Meter | None = None) -> list[dict[str, Any]]:
        """Answers the questions with each strategy (an AR checkpoint: once, greedily) and marks the answers.

        `meter` shows how far each way of decoding is.

        Returns: a row per way of decoding, the teacher's first: `decoding`, `right` (share), `unanswered`, `responses`,
            `empty` (how many of them have no text), `tokens_per_step`, `tokens_per_second`, `by_kind`, and where cases
            are re-ranked `rerank`. Beside a teacher also `of_teacher` (share of its score), `agreement`,
            `token_agreement`, `length_ratio` and, of a student, `held_out_kl` in nats (`against_teacher.py`); where the
            teacher verifies drafts `partings` (`partings.py`), None without any.

        Raises:
            OpdlmError: a prompt is empty or too long for the context.
        """
        self._meter = meter
        requests, decoder = self.questions.requests(self._decoding.max_new_tokens), self._decoder
        decoder.check_room(requests)
        rows, theirs = [], None
        if self._teacher is not None:
            self._teacher.check_room(requests)
            self._begin(TEACHER, len(requests))
            self._teacher.on_progress = self._done
            theirs = self._teacher.answer(requests, self._teacher.base, self._decoding.batch_size)
            rows.append(self._row(TEACHER, self._teacher, theirs))
            if self._options.prompt_lookup:
                rows.append(self._looked_up(self._teacher, requests, theirs))
        strategies = self._options.strategies or decoder.facts.usual_strategies
        for strategy in strategies if decoder.is_student else strategies[:1]:
            way = strategy if decoder.is_student else AUTOREGRESSIVE
            settings = replace(decoder.base.greedy(strategy), threshold=self._options.threshold)
            if theirs is not None:  # their distance is measured in the states of whole blocks
                settings = replace(settings, finish_blocks=True)
            self._begin(decoding_name(way, self._options.threshold), len(requests))
            decoder.on_progress = self._done
            answers = decoder.answer(requests, settings, self._decoding.batch_size)
            row = self._row(way, decoder, answers, theirs)
            if theirs is not None and decoder.is_student:
                grid = BlockGrid(settings.block_size, settings.block_grid)
                row["held_out_kl"] = self._held_out_kl(way, answers.trajectories, grid)
            if theirs is not None and way == "verified":
                row["partings"] = self._partings(requests, answers, theirs)
            rows.append(row)
        if self._options.prompt_lookup and self._teacher is None:
            rows.append(self._looked_up(decoder, requests, None))
        if theirs is not None:
            for row in rows[1:]:
                row["of_teacher"] = row["right"] / rows[0]["right"] if rows[0]["right"] else None
        return rows

    def samples(self, count: int) -> list[dict[str, Any]]:
        """Questions with the answers of every way of decoding, as many of each kind; call this after `rows`."""
        asked = self.questions.asked
        places = choose_evenly([kind for *_, kind in asked], min(count, len(asked))) if count else []
        return [
            {"question": asked[i][0], "accepted": list(asked[i][1]), "kind": asked[i][2]}
            | {"answers": {way: texts[i] for way, texts in self._texts.items()}}
            for i in places
        ]

    def _begin(self, name: str, total: int) -> None:
        if self._meter is not None:
            self._meter.begin(name, total)

    def _done(self, done: int) -> None:
        if self._meter is not None:
            self._meter(done)

    def _looked_up(
        self, decoder: Decoder, requests: Sequence[RolloutRequest], theirs: Answers | None
    ) -> dict[str, Any]:
        assert isinstance(decoder, CheckpointDecoder), "`check_in_process` refuses actors"
        drafts = self._options.prompt_lookup
        way = f"prompt lookup {drafts}"
        self._begin(way, len(requests))
        decoder.on_progress = self._done
        answers = decoder.look_up(requests, drafts)
        row = self._row(way, decoder, answers, theirs)
        return row if theirs is None else row | {"partings": self._partings(requests, answers, theirs)}

    def _partings(self, requests: Sequence[RolloutRequest], ours: Answers, theirs: Answers) -> dict[str, float] | None:
        """Where answers of drafts that the teacher verified differ from its own."""
        teacher = self._teacher
        assert teacher is not None, "the answers are compared with a teacher's"
        pairs = ours.responses, theirs.responses
        found = partings(teacher.model, requests, *pairs, _SCORE_TOKENS, teacher.facts.tokens)
        return None if found is None else asdict(found)

    def _row(self, way: str, decoder: Decoder, answers: Answers, theirs: Answers | None = None) -> dict[str, Any]:
        """The figures of one way of decoding; `theirs`: the teacher's answers, where they are compared with these."""
        from opdlm.deploy.evaluate.against_teacher import likeness  # loads the learner's modules

        marks = self.questions.mark(answers.responses)
        self._texts[way] = [decoder.text(ids) for ids in answers.responses]
        return {
            "decoding": way,
            "right": marks.right,
            "unanswered": marks.unanswered,
            "responses": len(answers.responses),
            "empty": decoder.count_empty(answers.responses),
            "tokens_per_step": answers.tokens_per_step,
            "tokens_per_second": answers.tokens / answers.seconds,
            "by_kind": marks.by_kind,
            **({"rerank": rerank_figures(self.questions.cases, marks.reranked)} if marks.reranked else {}),
            **({} if theirs is None else asdict(likeness(answers.responses, theirs.responses))),
        }

    def _held_out_kl(self, way: str, trajectories: Sequence[Trajectory], grid: BlockGrid) -> float | None:
        """Mean KL(teacher || student) in nats over the masked positions; None where there are none."""
        from opdlm.deploy.evaluate.against_teacher import summed_kl

        teacher, student = self._teacher, self._decoder
        assert teacher is not None, "the KL is to a teacher"
        assert isinstance(student, CheckpointDecoder), "`check_in_process` refuses actors"
        self._begin(f"KL to the teacher, {decoding_name(way, self._options.threshold)}", len(trajectories))
        total, positions, done = 0.0, 0, 0
        for part in in_groups(trajectories, _SCORED_AT_ONCE):
            targets = score(teacher.model, part, "hidden", 0, _SCORE_TOKENS, teacher.facts.tokens)
            scored = [ScoredTrajectory(t, target) for t, target in zip(part, targets, strict=True)]
            head, mask_id = teacher.model.lm_head.weight, require_mask(student.facts)
            form, tokens = student.facts.form, teacher.facts.tokens
            selection: Selection | None = "drafts" if way == "verified" else None
            nats, count = summed_kl(student.model, mask_id, scored, head, grid, form, tokens, selection=selection)
            total, positions, done = total + nats, positions + count, done + len(part)
            self._done(done)
        return total / positions if positions else None


def eval_tables(title: str, questions: Questions, rows: Sequence[dict[str, Any]], threshold: float) -> list[Table]:
    """The results as tables: all questions, what is compared with the teacher, and the score of each kind."""
    columns = [questions.figure, "tokens per denoising step", "tokens per second"]
    columns += ["unanswered"] if questions.may_be_unanswered else []
    names = [decoding_name(row["decoding"], threshold) for row in rows]
    first = new_table(title, "decoding", *columns)
    for name, row in zip(names, rows, strict=True):
        figures = [f"{row['right']:.1%}", f"{row['tokens_per_step']:.2f}", f"{row['tokens_per_second']:,.0f}"]
        first.add_row(name, *figures, *([str(row["unanswered"])] if questions.may_be_unanswered else []))
    tables = [first]
    if rows[0]["decoding"] == TEACHER:
        beside = "of its score", "same answer", "same tokens", "length ratio", "KL (nats)"
        second = new_table("beside the teacher's greedy answers", "decoding", *beside)
        for name, row in zip(names[1:], rows[1:], strict=True):
            shares = [_percent(row[figure]) for figure in ("of_teacher", "agreement", "token_agreement")]
            kl = row.get("held_out_kl")
            second.add_row(name, *shares, f"{row['length_ratio']:.2f}", "-" if kl is None else f"{kl:.3f}")
        tables.append(second)
    if parted := [(name, row["partings"]) for name, row in zip(names, rows, strict=True) if row.get("partings")]:
        tables.append(_partings_table(parted))
    if kinds := rows[0]["by_kind"]:
        third = new_table("right answers of each kind", "kind", "questions", *names)
        for kind, of in kinds.items():
            shares = [f"{row['by_kind'][kind]['right']:.1%}" for row in rows]
            third.add_row(kind, f"{of['questions']:,}", *shares)
        tables.append(third)
    return tables


def _partings_table(parted: Sequence[tuple[str, dict[str, float]]]) -> Table:
    """A row per way of decoding with answers that differ, as `Partings` has them."""
    columns = ["answers that differ", "median gap there", "largest", "of the two best", "median gap of all tokens"]
    table = new_table("the teacher's two best logits where answers first differ from its own", "decoding", *columns)
    for name, found in parted:
        gaps = [f"{found[gap]:.3f}" for gap in ("median_gap", "largest_gap")]
        shares = [f"{found['among_two_best']:.1%}", f"{found['median_gap_of_all']:.3f}"]
        table.add_row(name, f"{found['answers']:,}", *gaps, *shares)
    return table


def sample_lines(samples: Sequence[dict[str, Any]], threshold: float) -> Iterator[list[str]]:
    """The lines that show each sample."""
    for sample in samples:
        kind = f"[{sample['kind']}] " if sample["kind"] else ""
        lines = [f"{kind}{sample['question']}   (accepted: {', '.join(sample['accepted'])})"]
        lines += [f"  {decoding_name(way, threshold)}: {text.strip()!r}" for way, text in sample["answers"].items()]
        yield lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
