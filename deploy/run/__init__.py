"""One run, from its checks to its report.

train.py               the driver: the algorithm of a run
loops.py               its loops: produce, push, record
sources.py             where samples come from; given_responses.py, replay.py
recovery.py            what happens when something dies, is lost or comes too late
ending.py, stop.py     how the loops and the learner end together; signals
sample_references.py   the driver's references to samples
preflight.py           every check before an actor starts
plan.py                `opdlm plan`: what a run will do
directory.py, paths.py the run directory; paths as actors see them
compare.py             `opdlm compare`: several runs under one budget
"""
