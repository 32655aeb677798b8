"""The configuration of a run: its schema, loading it from YAML, and checks of the fields against each other.

`load_config` reads a run file and returns an `OpdlmConfig`, whose fields are the sections of the YAML; the docstring
below each field documents the setting. The package imports neither torch nor ray.
"""

from opdlm.common.config.base import DTYPE_BYTES, Attention, Dtype, Grid, OnNewWeights, Section, Strategy
from opdlm.common.config.checks import check_config, is_loopback
from opdlm.common.config.cluster import MachinesConfig, ResourcesConfig
from opdlm.common.config.load import apply_override, config_from_dict, dump_config, load_config
from opdlm.common.config.method import CurriculumConfig, Kind, ObjectiveConfig, OfflineConfig, Schedule, Selection
from opdlm.common.config.redact import holds_credentials, redact_credentials
from opdlm.common.config.roles import (
    LearnerConfig,
    OptimizerConfig,
    PlacementConfig,
    QueueConfig,
    RolloutConfig,
    TeacherConfig,
    ZeroConfig,
)
from opdlm.common.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OpdlmConfig,
    RunConfig,
)

__all__ = [
    "DTYPE_BYTES",
    "Attention",
    "CheckpointConfig",
    "CurriculumConfig",
    "DataConfig",
    "Dtype",
    "EvaluationConfig",
    "Grid",
    "Kind",
    "LearnerConfig",
    "LoraConfig",
    "MachinesConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OfflineConfig",
    "OnNewWeights",
    "OpdlmConfig",
    "OptimizerConfig",
    "PlacementConfig",
    "QueueConfig",
    "ResourcesConfig",
    "RolloutConfig",
    "RunConfig",
    "Schedule",
    "Section",
    "Selection",
    "Strategy",
    "TeacherConfig",
    "ZeroConfig",
    "apply_override",
    "check_config",
    "config_from_dict",
    "dump_config",
    "holds_credentials",
    "is_loopback",
    "load_config",
    "redact_credentials",
]
