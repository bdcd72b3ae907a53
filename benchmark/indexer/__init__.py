"""Parts of `bench_indexer.py`: what is run (cases), on which data, the two sides, and how they are checked and timed."""
