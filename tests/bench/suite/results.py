# SPDX-License-Identifier: Apache-2.0
"""The results of a comparison, and the file that holds them.

    results = Results('migrate', quick=True)
    results.add('1gbit/idle', 'vmmig-qemu', 'total_ms', [812.1, 790.4])
    results.save(path)          # the parts that were not run keep what the file said of them

The file is {"machine": {part: {...}}, "results": [{"part", "case", "tool", "metric", "unit", "runs", "median"}]}.
A run that did not come to an end is null in "runs"; a row of nothing else has the median null. "machine" says for each
part on what, with which versions and how it was measured, since parts may be run one by one.
"""
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import time

UNITS = {'ms': 'ms', 's': 's', 'bytes': 'B', 'pct': '%', 'MBps': 'MB/s', 'share': '1', 'count': '1', 'ratio': '1'}
VERSIONS = {'qemu': ['qemu-system-x86_64', '--version'], 'restic': ['restic', 'version'], 'borg': ['borg', '--version'],
            'casync': ['casync', '--version'], 'ceph': ['ceph', '--version']}


def unit(metric):
    """A metric's unit, which its name ends in; one that ends in none is a number."""
    return UNITS.get(metric.rpartition('_')[2], '1')


@functools.cache
def version(*argv):
    try:
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return re.search(r'\d+(\.\d+)*', said).group()


def machine(quick):
    with open('/proc/cpuinfo', encoding='ascii', errors='replace') as file:
        model = re.search(r'model name\s*:\s*(.*)', file.read()).group(1)
    return {'cpu': model, 'cpus': os.cpu_count(), 'kernel': platform.release(),
            'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'), 'quick': quick,
            'date': time.strftime('%Y-%m-%d', time.gmtime()),
            'versions': {name: found for name, argv in VERSIONS.items() if (found := version(*argv))}}


class Results:
    """What one part has measured."""

    def __init__(self, part, quick):
        self.part, self.machine, self.rows = part, machine(quick), []
        self.began = time.monotonic()

    def add(self, case, tool, metric, runs):
        known = [run for run in runs if run is not None]
        self.rows.append({'part': self.part, 'case': case, 'tool': tool, 'metric': metric, 'unit': unit(metric),
                          'runs': runs, 'median': statistics.median(known) if known else None})

    def add_all(self, case, tool, runs):
        """Of a list of {metric: value}, one for each run."""
        for metric in dict.fromkeys(metric for run in runs for metric in run):
            self.add(case, tool, metric, [run.get(metric) for run in runs])

    def save(self, path):
        said = load(path)
        self.machine['took_s'] = round(time.monotonic() - self.began)
        said['machine'][self.part] = self.machine
        said['results'] = [row for row in said['results'] if row['part'] != self.part] + self.rows
        with open(path + '.new', 'w', encoding='ascii') as file:
            json.dump({'machine': said['machine'], 'results': said['results']}, file, indent=1)
            file.write('\n')
        os.rename(path + '.new', path)


def load(path):
    try:
        with open(path, encoding='ascii') as file:
            return json.load(file)
    except FileNotFoundError:
        return {'machine': {}, 'results': []}
