"""How the loops are compiled: those that Python calls, and those that only loops call.

A function that Python can call needs two wrappers, which take as long to compile as a small loop.
"""

from numba import njit

entry = njit(no_cfunc_wrapper=True)
helper = njit(no_cfunc_wrapper=True, no_cpython_wrapper=True)
"""Never to be called from Python: there is no such code."""

inner = njit(inline="always", no_cfunc_wrapper=True, no_cpython_wrapper=True)
"""For what hot loops call: put in their place, as a call counts a reference to each array it gets.

Each place is compiled anew, so this is for small functions that few others call.
"""
