"""Rewards of finished responses, and what a group of them says about each (METHOD.md section 7)."""

from opdlm.common.data.reranking import Reference
from opdlm.common.rewards.advantage import advantages
from opdlm.common.rewards.attempt import Attempt, Reward, import_reward, make_reward

__all__ = ["Attempt", "Reference", "Reward", "advantages", "import_reward", "make_reward"]
