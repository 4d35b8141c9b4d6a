# SPDX-License-Identifier: Apache-2.0
"""What tests/bench/run is made of: a module for each part of the comparison, the format of the results, and the
report that is made of them."""
