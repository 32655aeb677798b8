"""Everything that runs: the command line, the driver of a run, the cluster, what one sees, evaluation, tools.

    *.yaml           run files
    cli/             the commands
    run/             the driver: train.py is the algorithm
    cluster/         joining Ray, starting the roles, placement, memory, scaling
    observe/         records, metrics, the terminal, reports
    evaluate/        questions, decoders, `opdlm eval`, `sweep`, lm-eval
    tools/           `opdlm generate`, `pretrain`, `trace`
    cluster_files/   files for Ray's launcher, KubeRay and Slurm
    grafana/         the dashboard

`deploy` imports `actors`, `learner` and `common`; nothing imports `deploy`, but for the public API (`opdlm/api.py`).
"""
