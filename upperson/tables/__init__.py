"""The tables and figures of the paper (arXiv 2504.10084), and those that compare and vary the methods, by one command:
`python -m upperson.tables V`.

    rows.py         which runs each table is made of: a row is a name and a configuration
    runs.py         trains the runs that are not there yet, and finds what they measured
    efficiency.py   what methods cost: parameters, FLOPs, memory, time
    render.py       Markdown, CSV and the plots, beside the paper's figures
    paper.csv       the paper's figures, with their sources
    __main__.py     the command
"""
