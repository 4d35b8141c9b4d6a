# SPDX-License-Identifier: Apache-2.0
"""Half a minute of tests/soak/repository.py on each store; `tools/check --soak` runs it for longer."""
import os
import subprocess
import sys

import pytest

from .conftest import TESTS


@pytest.mark.parametrize('driver', ['dir', 'rados'])
def test_half_a_minute_of_everything_at_once(driver):
    done = subprocess.run([sys.executable, os.path.join(TESTS, 'soak', 'repository.py'), driver, '--minutes', '0.5'],
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
