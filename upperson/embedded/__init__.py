"""The embedded data sets and the small CLIP, which need no network and no other files.

    dataset.py    synthetic people in several views, and scenes without people, by day and by night
    weights.py    a small CLIP that was trained on scenes without people (pretrain.py)

They prove the whole path, not the paper's accuracy.
"""
