"""MISA: a mixture-of-experts lightning indexer for DeepSeek Sparse Attention.

Data flows one way: SGLang's Indexer hands q, k, weights and metadata to `indexer`, which asks `router` for the active
heads of every query, scores the tokens with them and lets `selection` choose the top k. `patches` is the only module
that touches SGLang, `reference` the only one that defines anything.
"""
