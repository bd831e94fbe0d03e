"""The parts of tools/gpu_check.py: each section in a file of its own."""
