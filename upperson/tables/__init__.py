"""The tables and figures of the paper (arXiv 2504.10084), and tables that compare and vary the methods.

rows.py        the runs of each table: a row is a name and a configuration
runs.py        trains the missing runs, and reads their results
costs.py       the costs of methods: parameters, FLOPs, memory, time
paper_flops.py what the paper's Table IV counts as FLOPs
paper.py       the paper's numbers, from paper.csv
orderings.py   which orderings of the paper reappear
render.py      Markdown, CSV and plots, with the paper's numbers
__main__.py    the command: upperson tables V
"""
