"""What one ZeRO rank does: take a round, train it, publish the weights, save. Runs in Ray Train's worker group.

    restore ─► publish start weights ─► each round: take_round ─► steps ─► publish version r+1 ─► checkpoint if due
                                                       ▲ None: a stop was asked; save and end

A rank that dies takes the group down; Ray Train starts it again, and it goes on here from the last checkpoint, with
the same samples (the queue keeps them until a checkpoint covers them). A sample whose data died with a node is made
again while the rank waits.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opdlm.common.checkpoint import latest_checkpoint
from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.convert import save_model
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model, load_output_matrix
from opdlm.common.model.shards import weights_fingerprint
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.common.samples import SampleRef
from opdlm.common.types import WeightPack
from opdlm.common.weights import WeightPacker, load_weights
from opdlm.learner import zero
from opdlm.learner.distill import DistillModule
from opdlm.learner.group import LearnerSetup
from opdlm.learner.lora import add_adapters, save_adapter
from opdlm.learner.queue_client import QueueClient
from opdlm.learner.rollout_files import facts_of, round_file
from opdlm.learner.rollout_tasks import start_dump
from opdlm.learner.round_samples import RoundSamples
from opdlm.learner.saving import GiveUp, Saver
from opdlm.learner.schedule import TrainingSchedule, learning_rate, split
from opdlm.learner.train_step import StepResult, TrainStep


class Learner:
    """One rank: engine, plan, counters."""

    def __init__(self, setup: LearnerSetup) -> None:
        self.setup = setup
        self.config: OpdlmConfig = config_from_dict(setup.config)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.run_dir = Path(self.config.run.dir)
        config = self.config
        self.queue = QueueClient(setup.queue, self.rank, config.resources.call_timeout_seconds)
        torch.set_num_threads(max(int(config.learner.cpus_per_worker), 1))
        torch.manual_seed(config.run.seed)
        torch.use_deterministic_algorithms(config.run.deterministic)
        # Filling memory that nobody reads is for finding such reads; DeepSpeed allocates 2 GB of it in each backward.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.plan = TrainingSchedule(
            setup.total_samples,
            config.rollout.prompts_per_round,
            config.learner.batch_size,
            config.run.seed,
            config.learner.passes,
        )
        attention = _attention(config)
        student = load_model(setup.student, config.model.dtype, attention)
        if config.model.lora is not None:
            add_adapters(student, config.model.lora, config.run.seed)
        if config.learner.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        module = DistillModule(student, config.objective, config.learner.logits_chunk, attention)
        self.engine = zero.initialise(module, config.learner, config.model.dtype)
        self.step = TrainStep(
            self.engine,
            config.learner,
            config.objective,
            BlockGrid(config.rollout.block_size, config.rollout.block_grid),
            require_mask(read_facts(setup.student)),
            self._teacher_head(),
            config.run.seed,
        )
        checkpoint = config.checkpoint
        self.saver = Saver(self.engine, self.run_dir / "checkpoints", checkpoint.keep, checkpoint.max_failed_saves)
        self.packer = WeightPacker(on_device=config.rollout.weight_transport == "nixl")
        self.rounds = self.optimizer_steps = self.rollout_tokens = self._skipped_in_a_row = 0

    def run(self) -> None:
        """Trains to the end of the run, or to a stop."""
        saved = self._restore()
        pack = self._publish()
        while self.rounds < self.plan.rounds:
            waiting = time.perf_counter()
            taken = self.queue.take_round(self.rounds)
            if taken is None:
                break
            samples, staleness = taken
            self._train_round(samples, staleness, time.perf_counter() - waiting)
            del taken, samples  # not kept beyond their checkpoint (deploy/run/sample_references.py)
            pack = self._publish()
            if self.rounds % self.config.checkpoint.every_rounds == 0 and self.rounds < self.plan.rounds:
                saved = self.rounds if self._save() else saved
        if saved != self.rounds:
            self._save(last=True)
        if self.rounds == self.plan.rounds:
            self._export(pack)
        dist.barrier()

    def give_up(self, reason: str) -> None:
        """Has the driver end the run with this, once it has written what it was told before."""
        if self.rank == 0:
            self.queue.give_up(reason)
        dist.barrier()

    def _train_round(self, taken: list[SampleRef], staleness: list[int], waited: float) -> None:
        started = time.perf_counter()
        dump = self._start_dump(taken)
        tokens = forward_tokens = 0
        work = self._work(taken)
        samples = RoundSamples(taken, self._first_sample, self.queue)
        for pass_, places in self.plan.batches(self.rounds, len(taken)):
            share = samples.fetch(split(places, work, self.world)[self.rank])
            spare = share[-1] if share else samples.fetch(places[:1])[0]
            rate = learning_rate(
                self.optimizer_steps, self.plan.steps_before(self.plan.rounds), self.config.learner.optimizer
            )
            result = self.step(share, spare, rate, pass_)
            self.optimizer_steps += 1
            forward_tokens += result.tokens
            tokens += sum(s.trajectory.response_length for s in share) * (pass_ == 0)
            which = {"samples": [self._first_sample + place for place in places], "pass_number": pass_}
            if result.skipped:
                self._skip(result, which)
            else:
                self._skipped_in_a_row = 0
                self._tell_step(result, rate, which)
        # Before a checkpoint can cover the round.
        self.saver.require(
            f"{self.run_dir}/rollouts", lambda: dump and self.queue.ask(dump, "writing the round's rollouts")
        )
        total = torch.tensor([tokens], dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        self.rounds += 1
        self.rollout_tokens += int(total)
        self._tell(
            kind="round",
            rollout_tokens=self.rollout_tokens,
            round_tokens=int(total),
            train_forward_tokens=forward_tokens,
            staleness_mean=sum(staleness) / len(staleness),
            staleness_max=max(staleness),
            learner_wait_seconds=waited,
            train_seconds=time.perf_counter() - started,
        )

    def _work(self, samples: list[SampleRef]) -> list[float]:
        """What training each costs, in tokens of a forward: its clean half, and about so many copies of its response.

        Rank 0's, for all: a sample that is made again may have another length, and ranks may have taken different ones.
        """
        copies = self.config.rollout.block_size if self.config.objective.states == "all_states" else 1
        tokens = [s.prompt_tokens + (1 + copies) * s.response_tokens for s in samples]
        agreed = torch.tensor(tokens, dtype=torch.float64, device=self.engine.device)
        dist.broadcast(agreed, 0)
        return agreed.tolist()

    @property
    def _first_sample(self) -> int:
        return self.rounds * self.plan.prompts_per_round

    def _skip(self, result: StepResult, which: dict[str, Any]) -> None:
        """Counts a step whose gradient was not finite; ends the run after too many in a row."""
        self._skipped_in_a_row += 1
        reason = f"loss {result.loss}, gradient norm {result.grad_norm}"
        self._tell(kind="skipped_step", steps=1, in_a_row=self._skipped_in_a_row, reason=reason, **which)
        most = self.config.learner.max_skipped_steps
        if self._skipped_in_a_row > most:
            raise GiveUp(
                f"optimizer step {self.optimizer_steps}: {reason}, {self._skipped_in_a_row} in a row "
                f"(learner.max_skipped_steps {most}); the last checkpoint in {self.run_dir} is from before them"
            )

    def _start_dump(self, samples: list[SampleRef]) -> Any:
        """Rank 0 of a run with `run.dump_rollouts` has the round written; a round that is trained again, again."""
        if self.rank != 0 or not self.config.run.dump_rollouts:
            return None
        vocab_size = read_facts(self.config.model.teacher).vocab_size
        fingerprint = weights_fingerprint(self.config.model.teacher)
        facts = facts_of(self.config, vocab_size, self.setup.data_digest, fingerprint)
        return start_dump(round_file(self.run_dir / "rollouts", self.rounds), samples, facts)

    def _publish(self) -> WeightPack | None:
        """Gathers the weights (all ranks) and publishes them as version `rounds` (rank 0)."""
        started = time.perf_counter()
        named = zero.full_parameters(self.engine)
        if self.rank != 0:
            for _ in named:  # ZeRO-3 gathers collectively
                continue
            return None
        if self.config.rollout.weight_transport == "object_store":
            self.queue.publish(pack := self.packer.pack(self.rounds, named))
        elif self.rounds < self.plan.rounds:
            self.queue.publish_held(pack := self.packer.pack(self.rounds, named))
        else:  # the last version is still read when the learner has ended
            self.queue.publish(pack := WeightPacker().pack(self.rounds, named))
        self._tell(
            kind="publish",
            weight_version=self.rounds,
            publish_seconds=time.perf_counter() - started,
            nbytes=pack.nbytes,
        )
        return pack

    def _restore(self) -> int | None:
        """Loads the last checkpoint that the queue knows of, if there is one; returns its round.

        A newer one is of a life that outlived its driver for a moment: this life's records begin before it.

        Raises:
            OpdlmError: it is gone.
        """
        committed = self.queue.committed_rounds()
        checkpoint = latest_checkpoint(self.run_dir / "checkpoints", committed)
        if checkpoint is None and committed > 0:
            raise OpdlmError(
                f"the checkpoint of round {committed} in {self.run_dir}/checkpoints is gone; does another process work "
                "in this run directory? Once it has ended, go on with --resume"
            )
        if checkpoint is not None:
            zero.load_state(self.engine, checkpoint.folder)
            self.rounds = checkpoint.rounds
            self.optimizer_steps = int(checkpoint.state["optimizer_steps"])
            self.rollout_tokens = int(checkpoint.state["rollout_tokens"])
        self._tell(kind="learner_start")
        return self.rounds if checkpoint else None

    def _save(self, last: bool = False) -> bool:
        """Writes a checkpoint; a collective call. The queue then lets go of what it covers.

        Returns: whether it was written; where not, the queue keeps the samples and the run goes on.

        Raises:
            GiveUp: it was not, and the run may not go on (`checkpoint.max_failed_saves`, or `last`).
        """
        started = time.perf_counter()
        if self.rank == 0:
            self.queue.wait_until_written()
        problem = self.saver.save(self._state())
        seconds = time.perf_counter() - started
        if problem is not None:
            failed = {"saves": 1, "in_a_row": self.saver.failed_in_a_row, "reason": problem}
            self._tell(kind="failed_save", checkpoint_seconds=seconds, **failed)
            self.saver.end_if_due(problem, self.rounds, last)
            return False
        if self.rank == 0:
            self.queue.committed(self.rounds)
            self._tell(kind="checkpoint", checkpoint_seconds=seconds)
        return True

    def _state(self) -> dict[str, Any]:
        # Data order, decoding and state selection are functions of (seed, index): the cursor is their random state.
        return {
            "rounds": self.rounds,
            "optimizer_steps": self.optimizer_steps,
            "rollout_tokens": self.rollout_tokens,
            "weight_version": self.rounds,
            "next_sample": min(self.rounds * self.plan.prompts_per_round, self.plan.total),
            "total_samples": self.plan.total,
            "seed": self.config.run.seed,
            "torch_random_state": torch.get_rng_state().numpy().tobytes().hex(),
            "config_digest": self.setup.config_digest,
            "data_digest": self.setup.data_digest,
        }

    def _export(self, pack: WeightPack | None) -> None:
        """The finished student as a Hugging Face folder, `RUN/student`; its adapter in `RUN/adapter`. Collective."""
        lora, adapter = self.config.model.lora, self.run_dir / "adapter"
        if lora is not None and not adapter.exists():
            student = self.engine.module.student
            dist.barrier()  # nobody makes the folder before everybody has looked
            folder = adapter if self.rank == 0 else None
            self.saver.require(
                str(adapter), lambda: save_adapter(student, lora, self.setup.student, folder, zero.gathered)
            )
        destination = self.run_dir / "student"

        def write() -> None:
            if pack is None or destination.exists():
                return
            model = load_model(self.setup.student, self.config.model.dtype)
            load_weights(model, pack)
            save_model(model, load_tokenizer(self.setup.student), destination)

        self.saver.require(str(destination), write)

    def _teacher_head(self) -> torch.Tensor | None:
        if self.config.teacher.targets != "hidden" or self.config.objective.kind == "cft":
            return None
        return load_output_matrix(self.config.model.teacher, self.config.teacher.dtype).to(self.engine.device)

    def _tell_step(self, result: StepResult, rate: float, which: dict[str, Any]) -> None:
        kl = {"forward_kl_nats": result.loss} if self.config.objective.loss_is_forward_kl else {}
        share = result.attention_padding / max(result.tokens + result.attention_padding, 1)
        self._tell(kind="step", learning_rate=rate, attention_padding_share=share, **which, **asdict(result), **kl)

    def _tell(self, **event: Any) -> None:
        if self.rank == 0:
            self.queue.tell({"round": self.rounds, "step": self.optimizer_steps, **event})


def run_rank(setup: LearnerSetup) -> None:
    """One rank from its start to its end. An end that a restart would not mend is told, not raised."""
    learner = Learner(setup)
    try:
        learner.run()
    except GiveUp as reason:
        learner.give_up(str(reason))


def _attention(config: OpdlmConfig) -> str:
    if config.model.attention != "auto":
        return config.model.attention
    return "flex_attention" if config.learner.gpus_per_worker > 0 else "sdpa"
