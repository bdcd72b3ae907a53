"""MISA: a mixture-of-experts lightning indexer for DeepSeek Sparse Attention.

Data flows one way: SGLang's Indexer hands q, weights and metadata to `hooks`, which makes a batch of them and hands that to
`indexer`; it asks `operations` for the active heads of every query and for the top k of the tokens' scores by those. On a GPU
these are the kernels of sgl-kernel-misa, on a CPU `torch_operations`, with `router` and `selection`. `reference` defines
what all of them compute.

`patches` is the table of hooks on SGLang, `patching` checks that they engaged, `server_args` has the arguments and what is
refused. `evaluation` is for measurements, and idle elsewhere.
"""
