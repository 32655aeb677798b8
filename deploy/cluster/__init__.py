"""The cluster of a run.

`connection.py` joins Ray or starts a local one (`local_ray.py`), `placement.py` checks that the cluster is large enough
and reserves placement groups, `roles.py` starts the actors, and `scaling.py` changes their number during a run.
`memory.py` and `learner_memory.py` compute what each process needs, for `opdlm plan`.
"""
