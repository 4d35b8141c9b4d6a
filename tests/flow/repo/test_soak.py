# SPDX-License-Identifier: Apache-2.0
"""A minute of tests/soak/repository.py, on Ceph with --full; `tools/check --soak` runs it for longer."""
import os
import subprocess
import sys

import pytest

from .conftest import TESTS


@pytest.mark.parametrize('driver', ['dir', pytest.param('rados', marks=pytest.mark.full)])
def test_a_minute_of_everything_at_once(driver):
    done = subprocess.run([sys.executable, os.path.join(TESTS, 'soak', 'repository.py'), driver], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
