# SPDX-License-Identifier: Apache-2.0
"""SGLang's DeepSeek-Sparse-Attention path on a CPU, for tests without a GPU."""
