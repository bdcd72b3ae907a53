"""SGLang servers for the tests, the demo and the benchmarks of quality: started by `server`, asked by `client`.

Beside the overlay and not in it: what only asks a server, by its URL, needs no SGLang.
"""
