"""The parts of bench_serving_misa.py: what is served, what is asked, and what is kept of it."""
