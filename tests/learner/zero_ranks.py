"""What each rank of `test_zero.py` runs: train, save, load in another stage, train on."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from opdlm.actors.teacher.scoring import score
from opdlm.common.config.schema import LearnerConfig, LoraConfig, ObjectiveConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import add_adapters
from opdlm.common.types import PolicyTargets, ScoredTrajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.lora import save_adapter
from opdlm.learner.policy_gradient import Draws
from opdlm.learner.train_step import TrainStep
from tests.tiny import MASK, tiny_model, trajectory

RATE, STEPS, SAVED_AFTER = 1e-2, 4, 2
LORA = LoraConfig(rank=3, alpha=6, target_modules=["q_proj", "o_proj", "down_proj"])
OBJECTIVE = ObjectiveConfig(exclude_eos=False, selection="all_states")
POLICY = ObjectiveConfig(kind="rl", clip_low=0.2, clip_high=0.3, kl_beta=0.1)
DRAWS = Draws(temperature=0.8, never=(MASK, 0))


def student(dtype: str = "float32", tied: bool = False):
    """A tiny model of odd sizes, so that no parameter divides evenly by two ranks."""
    return tiny_model(2, hidden_size=15, tied=tied).to(getattr(torch, dtype))


def learner_config(stage: int, workers: int, micro_batch_tokens: int, gpus: float = 0) -> LearnerConfig:
    """Settings with a gradient clip that takes effect; the tests set the learning rate themselves."""
    return LearnerConfig.model_validate(
        {
            "workers": workers,
            "batch_size": 5,
            "micro_batch_tokens": micro_batch_tokens,
            "optimizer": {"lr": RATE, "grad_clip": 0.5},
            "zero": {"stage": stage},
            "gpus_per_worker": gpus,
        }
    )


def batches() -> list[list[ScoredTrajectory]]:
    """STEPS batches of trajectories of different lengths: five each, and one in the last."""
    rng, teacher, result = np.random.default_rng(0), tiny_model(1), []
    for step in range(STEPS):
        batch = []
        for i in range(5):
            kept = 4 * int(rng.integers(1, 4))
            one = trajectory(
                list(rng.integers(3, 30, 4)), list(rng.integers(3, 30, kept)), list(rng.integers(1, 5, kept))
            )
            batch.append(replace(one, index=5 * step + i))
        late = np.array([1] + [2] * (len(batch[-1].response_ids) - 1), np.int32)
        batch[-1] = replace(batch[-1], response_length=1, reveal_step=late)  # its second state has no loss position
        result.append(
            [ScoredTrajectory(t, s) for t, s in zip(batch, score(teacher, batch, "hidden", 1, 64), strict=True)]
        )
    result[-1] = result[-1][:1]  # fewer trajectories than ranks
    return result


def policy_batches() -> list[list[ScoredTrajectory]]:
    """The same batches for a policy gradient: drawn by other weights than the student's, one in five left out."""
    rng, result = np.random.default_rng(1), []
    for batch in batches():
        samples = []
        for place, scored in enumerate(batch):
            kept = len(scored.trajectory.response_ids)
            old, reference = rng.uniform(-5, -1, (2, kept)).astype(np.float32)
            drawn = replace(scored.trajectory, reveal_logprob=old)
            advantage = None if place == 1 else float(rng.normal())
            targets = PolicyTargets(advantage, reference[: drawn.response_length])
            samples.append(ScoredTrajectory(drawn, targets))
        result.append(samples)
    return result


def with_nan(sample: ScoredTrajectory) -> ScoredTrajectory:
    """The same sample with NaN as the teacher's hidden states."""
    hidden = sample.targets.hidden.copy()
    hidden[:] = np.nan
    return replace(sample, targets=replace(sample.targets, hidden=hidden))


def make_step(engine, config: LearnerConfig, objective: ObjectiveConfig = OBJECTIVE) -> TrainStep:
    """The step under test, with the teacher's output matrix."""
    head = tiny_model(1).lm_head.weight.detach().to(engine.device)
    return TrainStep(engine, config, objective, BlockGrid(4), MASK, head, seed=0, draws=DRAWS)


def run_rank(rank: int, world: int, port: int, folder: str, gpus: int = 0) -> None:
    """All stages in one process group; rank 0 leaves the results in `folder`. `gpus`: of each rank, 0 or 1."""
    warnings.filterwarnings("ignore")
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    if gpus:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if gpus else "gloo", rank=rank, world_size=world)
    from opdlm.learner import zero

    results: dict[str, dict] = {}
    data, root = batches(), Path(folder)

    def train(
        name: str,
        stage: int,
        dtype: str,
        first: int,
        restore: Path | None,
        save: Path | None,
        lora: bool = False,
        tied: bool = False,
    ) -> None:
        config = learner_config(stage, world, 40, gpus)
        model = student(dtype, tied)
        if lora:
            add_adapters(model, LORA, seed=0)
        engine = zero.initialise(DistillModule(model, OBJECTIVE, 3), config, dtype)
        if restore is not None:
            zero.load_state(engine, restore)
        step, figures = make_step(engine, config), []
        for i in range(first, STEPS):
            if i == SAVED_AFTER and save is not None:
                tensors = zero.state_tensors(engine)
                if rank == 0:
                    save.mkdir()
                    zero.write_state(engine, tensors, save)
                assert len(list(tensors)) == (0 if rank == 0 else 3 * len(zero._shapes(engine)))
                dist.barrier()
            outcome = step(data[i][rank::world], data[i][0], RATE)
            figures.append((outcome.loss, outcome.grad_norm, outcome.rows, outcome.rows_without_loss))
        weights = {n: p.clone().cpu() for n, p in zero.full_parameters(engine)}
        results[name] = {"figures": figures, "weights": weights}
        if lora:
            save_adapter(
                engine.module.student, LORA, "base", root / f"adapter-{name}" if rank == 0 else None, zero.gathered
            )

    for stage, other in ((1, 3), (2, 1), (3, 2)):
        train(f"zero-{stage}", stage, "float32", 0, None, root / f"from-{stage}")
        train(f"zero-{stage}-resumed", stage, "float32", SAVED_AFTER, root / f"from-{stage}", None)
        train(f"zero-{stage}-resumed-as-{other}", other, "float32", SAVED_AFTER, root / f"from-{stage}", None)
        train(f"tied-{stage}", stage, "float32", 0, None, None, tied=True)
        config = learner_config(stage, world, 40, gpus)
        step = make_step(zero.initialise(DistillModule(student(), POLICY, 3), config, "float32"), config, POLICY)
        outcomes = [step(batch[rank::world], batch[0], RATE) for batch in policy_batches()]
        results[f"policy-{stage}"] = {
            "figures": [(o.loss, o.grad_norm, o.rows, o.loss_positions) for o in outcomes],
            "policy": [o.policy for o in outcomes],
            "weights": {n: p.clone().cpu() for n, p in zero.full_parameters(step.engine)},
        }
    train("tied-lora", 3, "float32", 0, None, None, lora=True, tied=True)
    for stage, dtype in ((1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16")):
        config = learner_config(stage, world, 40, gpus)
        engine = zero.initialise(DistillModule(student(dtype), OBJECTIVE, 3), config, dtype)
        step, good = make_step(engine, config), data[0]
        outcomes = [step(good[rank::world], good[0], RATE)]
        before = {n: p.clone() for n, p in zero.full_parameters(engine)}
        broken = [with_nan(good[0]), *good[1:]]  # in one rank's share only
        outcomes.append(step(broken[rank::world], good[0], RATE))
        unchanged = all(torch.equal(before[n], p) for n, p in zero.full_parameters(engine))
        outcomes.append(step(data[1][rank::world], data[1][0], RATE))
        results[f"skips-{stage}-{dtype}"] = {"skipped": [o.skipped for o in outcomes], "unchanged": unchanged}
        if dtype == "float32":
            results[f"skips-{stage}-{dtype}"]["figures"] = [(o.loss, o.grad_norm) for o in outcomes]
    train("bf16", 2, "bfloat16", 0, None, root / "from-bf16")
    train("bf16-resumed", 2, "bfloat16", SAVED_AFTER, root / "from-bf16", None)
    for stage, other in ((2, 3), (3, 2)):
        train(f"lora-{stage}", stage, "float32", 0, None, root / f"from-lora-{stage}", lora=True)
        train(f"lora-{stage}-resumed", stage, "float32", SAVED_AFTER, root / f"from-lora-{stage}", None, lora=True)
        resumed = f"lora-{stage}-resumed-as-{other}"
        train(resumed, other, "float32", SAVED_AFTER, root / f"from-lora-{stage}", None, lora=True)
    if rank == 0:
        torch.save(results, root / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
