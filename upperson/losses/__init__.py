"""The training losses.

names.py      the losses by name, and a weighted sum of them as text: "sdm+0.5*id"
pairs.py      sdm, itc, cmpm: losses over the pairs of a batch
heads.py      id, mlm: losses with their own parameters
balance.py    balance: a loss over the experts that tokens choose
objective.py  the weighted sum, computed from a model and a batch
"""
