# SPDX-License-Identifier: Apache-2.0
"""Options and fixtures of all tests of the whole system."""
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

pytest_plugins = ['lab.plugin']


def pytest_addoption(parser):
    parser.addoption('--full', action='store_true', help='repetitions, large guests, long runs')


def pytest_configure(config):
    config.addinivalue_line('markers', 'full: runs with --full only')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--full'):
        return
    items[:] = [item for item in items if not item.get_closest_marker('full')]


@pytest.fixture(scope='session')
def full(request):
    return request.config.getoption('--full')
