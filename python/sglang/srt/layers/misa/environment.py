"""The environment variables of MISA, for evaluation only. Imports nothing."""

# A directory in which the indexer's calls are recorded: `evaluation.capture`.
CAPTURE_DIR = "SGLANG_MISA_CAPTURE_DIR"

# One of SELECTIONS, which then selects instead of MISA: `evaluation.selections`.
EVAL_SELECTION = "SGLANG_MISA_EVAL_SELECTION"
SELECTIONS = {
    "hisa": "HISA's 64 blocks of 128 tokens, scored by all heads",
    "random-heads": "--misa-active-heads other heads for every query, by chance",
    "random-heads-shared": "the shared head beside other heads than the routed ones for every query, by chance",
    "half-slopes": "the sampled router's heads, and a shared head that takes 1/2 for the slope of every head",
    "free": "a token of each stretch of the prefix by chance, without a look at the scores: what selection costs at least",
    "heaviest-heads": "the --misa-active-heads of the largest average weight, the same for all queries",
}
