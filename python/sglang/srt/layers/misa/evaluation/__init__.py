"""For evaluation only, no feature of MISA: what the indexer chooses, recorded, and what MISA is measured against.

`capture` writes records and `selections` chooses otherwise; `hooks` does either in a server, where the variables of
`environment` are set when it loads its plugins. Elsewhere nothing of this is imported, but for `patches`.
"""
