"""One run.

fit.py           the whole job, from the configuration to the results; read this first
loop.py          a training: steps, epochs, evaluations, and how they are saved and resumed
optimizer.py     Adam, warm-up and cosine
run_folder.py    the files of a run, and claiming a folder for them
log.py           metrics.jsonl and TensorBoard
resume.py        the state that a stopped run continues from
interruption.py  Ctrl-C stops all processes at the same step
progress.py      how far a run is, and how long it will take
__main__.py      the command: upperson train
"""
