"""Rewards of finished responses, and what a group of them says about each (METHOD.md section 7)."""
