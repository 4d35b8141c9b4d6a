# SPDX-License-Identifier: Apache-2.0
"""Tests with faults; options and fixtures are those of tests/lab/plugin.py."""
import os
import sys

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for folder in (os.path.dirname(os.path.abspath(__file__)), os.path.join(TESTS, 'flow'), TESTS):
    sys.path.insert(0, folder)

pytest_plugins = ['lab.plugin']
