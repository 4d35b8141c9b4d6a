#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Which libraries a program loads: those named, each of them, and of others only what every program has.

usage: linkage.py PROGRAM LIBRARY...
"""
import re
import subprocess
import sys

EVERYONES = {'libc', 'libgcc_s', 'libm', 'libdl', 'libpthread', 'librt'}

program, *expected = sys.argv[1:]
found = subprocess.run(['ldd', program], capture_output=True, text=True, check=True).stdout
names = set(re.findall(r'^\s*(lib[a-z_0-9-]+?)[.-][0-9so]', found, re.M))
names -= EVERYONES | {name for name in names if name.startswith(('libasan', 'libubsan'))}
assert names == set(expected), f'{program} loads {sorted(names)}, not {sorted(expected)}'
