"""Fitting a cost model to the machine at hand: measure in two processes, fit, check.

`measure` needs torch alone (no Megatron); `fit` is numpy.
"""
