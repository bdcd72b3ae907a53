"""mini-DSA: a small model of DeepSeek-V3.2's architecture, to be trained on one GPU."""
