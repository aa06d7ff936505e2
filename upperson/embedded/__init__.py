"""The embedded data sets and the small CLIP, which need neither a network nor other files.

    dataset.py    synthetic people in several views, and scenes without people, by day and by night
    weights.py    a small CLIP, trained on scenes without people (pretrain.py)

They test the whole program. They do not show the paper's accuracy.
"""
