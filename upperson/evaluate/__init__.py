"""Evaluation of a model by retrieval.

metrics.py     R@k, mAP and mINP of every query
embed.py       the features of a split, and retrieval in both directions
results.py     the record of a model on a split, written as results.json
tables.py      results as text and Markdown
pictures.py    the training curve and the top ten
evaluation.py  evaluation of a checkpoint on any data set, in both directions
__main__.py    the command: upperson evaluate
"""
