"""What parts of LLEP cost; each file is a script, and a module that `python -m` runs."""
