#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""What the holder of a mount needs: guests die with it, so that no library of the repository's is among it.

usage: linkage.py VMMIG_MOUNT
"""
import re
import subprocess
import sys

found = subprocess.run(['ldd', sys.argv[1]], capture_output=True, text=True, check=True).stdout
names = set(re.findall(r'^\s*(lib[a-z_0-9]+)[.-]', found, re.M))
assert 'libfuse3' in names, found
names -= {name for name in names if name.startswith(('libasan', 'libubsan'))}
assert names <= {'libfuse3', 'libevent', 'libc', 'libgcc_s', 'libm', 'libdl', 'libpthread', 'librt'}, names
