"""Configuration of a run: schema, loading, cross-field checks. Imports no torch and no ray."""

from opdlm.common.config.load import config_from_dict, dump_config, load_config
from opdlm.common.config.schema import OpdlmConfig

__all__ = ["OpdlmConfig", "config_from_dict", "dump_config", "load_config"]
