"""The learner: trains the student on scored trajectories with DeepSpeed ZeRO, publishes its weights, and saves.

    group.py, setup.py, gpu_backend.py  starting the worker group with Ray Train; its arguments; its process group
    worker.py, round_training.py        what each ZeRO rank does; training on one round
    schedule.py                         rounds, optimizer steps, shares of a batch, learning rate
    train_step.py                       one optimizer step
    states.py, rows.py, packing.py      which positions are masked -> training rows -> micro-batches of bounded size
    row_attention.py                    attention of training rows where there is no flex_attention
    targets.py, losses.py               the teacher's distributions, and the divergence from them
    distill.py                          the module that is trained: the student's forward and its loss
    chunked_loss.py, tied_embedding.py  the gradients of output matrix and embedding in little memory
    lora.py, zero.py, saving.py         adapters; DeepSpeed; checkpoints and the finished student
    queue_client.py, round_samples.py   calls to the replay queue; the samples of a round
    rollout_files.py, rollout_tasks.py  saved rollouts, and the Ray tasks that write and read them

`learner/` imports `common/`, and never `actors/` or `deploy/`. A public name is imported with its module when it is
first used: Ray Train's own actors load this package, and need neither torch nor deepspeed. (`chunked_loss` is the name
of a module here; its function is `opdlm.learner.chunked_loss.chunked_loss`.)
"""

from __future__ import annotations

from opdlm.common.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "distill": ["DistillModule"],
        "group": ["fit"],
        "lora": ["merged_parameters", "save_adapter"],
        "losses": ["divergence", "forward_kl", "jensen_shannon", "reverse_kl"],
        "packing": ["MicroBatch", "collate", "micro_batches", "pack"],
        "queue_client": ["QueueClient"],
        "rollout_files": [
            "RolloutFacts",
            "RoundHeader",
            "facts_of",
            "load_samples",
            "read_header",
            "round_file",
            "save_round",
        ],
        "rollout_tasks": ["ReadFacts", "start_dump", "start_read"],
        "round_samples": ["RoundSamples"],
        "round_training": ["RoundTrainer"],
        "rows": ["Row", "build_row", "build_rows"],
        "saving": ["GiveUp", "Saver"],
        "schedule": ["Progress", "TrainingSchedule", "learning_rate", "share_by_work"],
        "setup": ["LearnerSetup"],
        "states": ["BlockStates", "SELECTIONS"],
        "targets": ["PositionTargets", "gather_targets", "load_teacher_head"],
        "train_step": ["StepResult", "TrainStep"],
        "worker": ["Learner", "run_rank"],
    },
)
