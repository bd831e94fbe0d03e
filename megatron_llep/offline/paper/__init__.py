"""The LLEP paper's figures (arXiv 2601.17111), and what the cost model says beside them.

`figures` has the numbers, `predict` the cost model's for the same settings, `fit` the fixed cost
of a layer that brings them together, `comparison` how far apart they are, and `page` the tables.
"""
