# SPDX-License-Identifier: Apache-2.0
"""How good a model is, how fast and how large: ``python -m mosaic_kernels.evaluate``."""
