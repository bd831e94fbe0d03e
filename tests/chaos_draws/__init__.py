"""Random cases of real MoE layers, LLEP against unmodified Megatron, thousands of them.

`draw` makes a case of a seed and a number; `layers` and `compare` run it on one rank; `crew` keeps
forked ranks that run one after another; `session` runs many, and `record` keeps count of them.
"""
