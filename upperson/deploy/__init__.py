"""Deployment of trained models, and exchange with other programs.

importing.py  checkpoints of other programs; the command: upperson import
formats.py    their formats: under which key each parameter is found
export.py     both towers as ONNX; the command: upperson export
towers.py     reads an export by onnxruntime, NumPy and Pillow alone; a copy of it is in every export
merge.py      merges a checkpoint into the weights of a plain CLIP; the command: upperson merge
share.py      a model as a folder with a model card, or on the Hugging Face hub
switching.py  several adaptations of one backbone, switched at run time
outputs.py    output files and folders, complete or not there
"""
