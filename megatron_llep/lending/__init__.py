"""Lending: expert weights to borrowers in forward, their gradients home in backward.

Foreign weights are plain tensors in one flat buffer a layer and micro-batch: outside parameters,
optimizer, DDP and checkpoints. `fan_out.py` is plain arithmetic, without torch.
"""
