"""Deployment of trained models.

merge.py      merges a checkpoint into the weights of a plain CLIP; the command: upperson merge
switching.py  several adaptations of one backbone, switched at run time
"""
