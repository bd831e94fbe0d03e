"""The planners' algorithms: plain loops over int64 arrays, which numba compiles.

Only `planner.compiled` imports these modules, when something is planned: numba is slow to import.
They share no state, and write only into the arrays that their docstrings name.
"""
