"""What routing would do: counted beside plain expert parallelism, which runs as it is."""
