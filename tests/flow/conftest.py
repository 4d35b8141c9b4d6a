# SPDX-License-Identifier: Apache-2.0
"""Tests of the whole system; options and fixtures are those of tests/lab/plugin.py."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

pytest_plugins = ['lab.plugin']
