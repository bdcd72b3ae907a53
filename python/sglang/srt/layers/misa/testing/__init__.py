"""What tests and benchmarks share: inputs (`inputs`, `score_inputs`), batches of them in a paged cache (`batches`), and the
judge of what was selected from them (`judge`). Nothing here runs in a server.
"""
