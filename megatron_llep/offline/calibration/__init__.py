"""Fitting a cost model to the machine at hand: measure in several processes, fit, check.

`measure` needs torch alone (no Megatron); `fit` and `reach` are numpy.
"""
