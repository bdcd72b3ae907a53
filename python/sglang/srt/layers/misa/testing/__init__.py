"""What tests and benchmarks share: inputs (`inputs`, `score_inputs`), batches of them in a paged cache (`batches`), the judge of
what was selected from them (`judge`), and how much of DSA's selection another one holds (`recall`). Nothing here runs in a server.
"""
