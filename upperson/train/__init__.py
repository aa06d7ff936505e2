"""One training run.

fit.py           the whole job, from the configuration to the results; read this file first
loop.py          a training: steps, epochs and evaluations; saving and resuming
optimizer.py     Adam, warm-up and cosine
run_folder.py    the files of a run, and the choice of a folder
log.py           metrics.jsonl and TensorBoard
resume.py        the saved state of an interrupted run
interruption.py  stops all processes at the same step after Ctrl-C
progress.py      the position of a run, and the time left
__main__.py      the command: upperson train
"""
