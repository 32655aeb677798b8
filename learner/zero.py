"""DeepSpeed ZeRO around a `DistillModule`: engine, whole weights, and a state that any number of ranks can load.

The only file that imports deepspeed. Call `initialise` in every rank of a running torch.distributed group.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from opdlm.common.config.schema import LearnerConfig
from opdlm.common.tensor_file import TensorFile
from opdlm.learner.lora import merged_parameters

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names for its two moments."""


def initialise(module: Any, config: LearnerConfig, dtype: str) -> Any:
    """Wraps a `DistillModule` whose parameters have the training dtype; returns the DeepSpeed engine.

    The caller accumulates gradients: it calls `backward` once per micro-batch, then `step` once (`train_step.py`).
    """
    on_gpu = config.gpus_per_worker > 0
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    if not on_gpu:
        # DeepSpeed would compile this op of its inference path, which takes 40 s and fails without a C++ compiler.
        compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
        compatible["deepspeed_shm_comm"] = False
    if config.zero.stage == 3:
        # `DistillModule` reads the output matrix itself, so ZeRO-3 gathers it for the module's forward and backward.
        deepspeed.zero.register_external_parameter(module, module.student.lm_head.weight)
    backend = "nccl" if on_gpu else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        fused=True,  # one pass over memory, on CPUs too
    )
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=_engine_config(config, dtype), dist_init_required=False
    )
    _create_moments(engine, step=0.0)
    return engine


def _engine_config(config: LearnerConfig, dtype: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero.stage, "overlap_comm": config.gpus_per_worker > 0}
    if config.gpus_per_worker > 0 and config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.gpus_per_worker > 0 and config.zero.offload_weights:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; our micro-batches are bounded by tokens
        "gradient_accumulation_steps": 1,  # the caller sets the boundary, before each backward
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        # Micro-batches are summed in float32, but not in stage 1, where DeepSpeed would take another optimizer class.
        "data_types": {"grad_accum_dtype": "fp32" if config.zero.stage > 1 else None},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def full_parameters(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole weight) of the student's parameters, adapters merged in, gathered one by one. A collective call."""
    return merged_parameters(engine.module.student, gathered)


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """A context in which the parameters are whole on every rank. A collective call."""
    if not hasattr(parameters[0], "ds_id"):  # stages 1 and 2 keep whole weights on every rank
        yield
    else:
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield


def _trained_parameters(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in engine.module.student.named_parameters() if p.requires_grad)


def state_bytes(engine: Any) -> int:
    """Bytes of everything that `state_tensors` gives: 12 for each trained parameter."""
    return sum((1 + len(_MOMENTS)) * 4 * shape.numel() for shape in _shapes(engine).values())


def state_tensors(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole float32 tensor) of the state that `load_state` puts back, gathered one by one. A collective call.

    The weights have the names of their parameters, AdamW's moments are `exp_avg.NAME` and `exp_avg_sq.NAME`. Every rank
    must go through all of them, and at most one of them is in memory at a time.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for name, parameter in _trained_parameters(engine):
        yield name, safe_get_full_fp32_param(parameter).detach()
        for key in _MOMENTS:
            yield f"{key}.{name}", safe_get_full_optimizer_state(parameter, key).detach()


def write_state(engine: Any, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Writes the tensors as they come into two safetensors files; see `common/checkpoint.py`. The first rank calls it.

    Raises:
        OSError: the disk did not take them. The caller goes through the tensors that are left.
    """
    shapes = {name: tuple(shape) for name, shape in _shapes(engine).items()}
    of_moments = {f"{key}.{name}": shape for name, shape in shapes.items() for key in _MOMENTS}
    with (
        TensorFile(folder / "weights.safetensors", shapes, {}) as weights,
        TensorFile(folder / "optimizer.safetensors", of_moments, {"step": str(_adam_step(engine))}) as moments,
    ):
        for name, tensor in tensors:
            (weights if name in shapes else moments).write(name, tensor)
            del tensor  # before the next one is gathered


def _shapes(engine: Any) -> dict[str, torch.Size]:
    """The whole shape of each trained parameter, by name; stage 3 keeps it beside the rank's part."""
    return {name: getattr(p, "ds_shape", p.shape) for name, p in _trained_parameters(engine)}


def load_state(engine: Any, folder: Path) -> None:
    """Puts a saved state back, on any number of ranks and in any ZeRO stage. A collective call."""
    with (
        safe_open(folder / "weights.safetensors", "pt") as weights,
        safe_open(folder / "optimizer.safetensors", "pt") as moments,
    ):
        _create_moments(engine, float(moments.metadata()["step"]))
        for name, parameter in _trained_parameters(engine):
            value = weights.get_tensor(name)
            _set_partition(parameter, value, None)
            for key in _MOMENTS:
                _set_partition(parameter, moments.get_tensor(f"{key}.{name}"), key)
            _set_working_copy(parameter, value)


@torch.no_grad()
def _set_partition(parameter: Any, value: torch.Tensor, key: str | None) -> None:
    """Writes this rank's part of a float32 weight (`key` None) or of the moment `key`.

    DeepSpeed's own `safe_set_full_*` fails on ZeRO-3 where a parameter does not divide evenly by the number of ranks.
    """
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    flat = value.flatten()
    if hasattr(parameter, "ds_id"):
        part = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
        start = part.numel() * torch.distributed.get_rank()
        mine = flat[start : start + part.numel()]
        part[: mine.numel()].copy_(mine)
    elif parameter._hp_mapping is not None:  # None: this rank's partition has no part of the parameter
        address = parameter._hp_mapping.lp_fragment_address
        part = parameter._hp_mapping.get_hp_fragment(key)
        part.copy_(flat[address.start : address.start + address.numel])


@torch.no_grad()
def _set_working_copy(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Writes the weight that the forward uses, in the training dtype."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.copy_(value)
    else:
        parameter.copy_(value)


def _adamw(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's optimizer; its parameters are this rank's flat partitions."""
    return engine.optimizer.optimizer


def _adam_step(engine: Any) -> float:
    return max(float(state["step"]) for state in _adamw(engine).state.values())


def _create_moments(engine: Any, step: float) -> None:
    """Creates AdamW's state, which AdamW itself creates at its first step: saving and loading need it before.

    At step 0, a state of zeros is what AdamW would start with.
    """
    optimizer = engine.optimizer
    partitions = (
        optimizer.fp32_partitioned_groups_flat  # stage 3
        if hasattr(optimizer, "fp32_partitioned_groups_flat")
        else optimizer.single_partition_of_fp32_groups  # stages 1 and 2
    )
    fused = bool(_adamw(engine).defaults.get("fused"))
    for partition in partitions:
        state = _adamw(engine).state[partition]
        state["step"] = torch.tensor(step, device=partition.device if fused else "cpu")
        for key in _MOMENTS:
            state.setdefault(key, torch.zeros_like(partition))
    # Stages 1 and 2 keep for each parameter where its part of the state is.
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()
