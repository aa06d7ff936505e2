"""What the benchmarks share. A module imports only modules that stand below it here.

parts         the programs of a report: run within a time limit, kept, not run again
targets       what the project set out to reach, and which measured ratios reach it
operators     the command of attn.py and adapter.py: every shape, sweeps, the JSON file, the plot
comparison    the candidates of one operator: first whether they are correct, then how fast they are
profiling     where the time of a training step goes, by kind of operation
counting      operations, bytes, memory, calls and launches of a training step, counted without a clock
paths         the ways to compute a training step
absent_gpu    kernels compiled and recorded as on a GPU that is not there
sass          the instructions of a compiled kernel
device        the device's name and rates, and the environment of a measurement
timing        the clocks
output        tables, JSON files, one line for an error
options       types of command-line arguments
"""
