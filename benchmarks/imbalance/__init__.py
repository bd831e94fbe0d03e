"""How methods against token imbalance compare, under workloads W0 to W7: see `__main__`."""
