# SPDX-License-Identifier: Apache-2.0
"""pytest plugin: the report of a failed test shows the logs and consoles of the labs that it ran in."""
import pytest

from .hosts import Lab


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):  # pylint: disable=unused-argument
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        for lab in Lab.active:
            lab.failed = True
            report.sections.append((f'lab in {lab.folder}', lab.report()))
