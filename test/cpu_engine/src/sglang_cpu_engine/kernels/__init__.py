# SPDX-License-Identifier: Apache-2.0
"""Torch replacements for the CUDA and Triton kernels that serving a DSA model calls, one idea a file."""
