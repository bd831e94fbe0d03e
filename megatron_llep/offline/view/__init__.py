"""A recording as one page: who was busy, what lending did about it, and how routing drifted.

`gather` sums a recording up in a table of cells (layer x column of steps), `details` keeps of each
cell its worst micro-batch, `times` predicts steps, `drift` follows experts. `page` writes all of it
into one file of HTML with the scripts and styles of `assets`.
"""
