# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels, rankings, pruning runs and whole models do on a GPU."""
