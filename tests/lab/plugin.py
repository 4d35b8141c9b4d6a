# SPDX-License-Identifier: Apache-2.0
"""pytest plugin: the option --full, and the report of a failed test shows the logs and consoles of the labs
that it ran in."""
import pytest

from .hosts import Lab


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


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):  # pylint: disable=unused-argument
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        for lab in Lab.active:
            lab.failed = True
            report.sections.append((f'lab in {lab.folder}', lab.report()))
