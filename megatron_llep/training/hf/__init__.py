"""Hugging Face checkpoints: shapes from `config.json`, weights into a Megatron model and back.

`flags.py` reads the shape before anything is built, `arguments.py` refuses what cannot work,
`load.py` and `save.py` move the weights, through megatron-bridge (`bridge.py`).
"""
