"""What tests and benchmarks share: how much of DSA's selection another one holds (`recall`). Nothing here runs in a server."""
