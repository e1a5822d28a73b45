# SPDX-License-Identifier: Apache-2.0
"""Quality of pruned models: every method on the same budget, text and seeds; see ``__main__``."""
