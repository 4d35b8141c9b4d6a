# SPDX-License-Identifier: Apache-2.0
"""The results of a comparison, and the file that holds them.

    results = Results('migrate', quick=True, path=path)
    results.add('1gbit/idle', 'vmmig-qemu', 'total_ms', [812.1, 790.4])
    results.save()          # now and then: parts that were not run keep what the file said of them
    results.end()           # the same, once all of the part was run

A run that was interrupted is gone on with by Results(..., go_on=True): what the file has of this part, of the same
commit() and the same kind of run, is kept, results.complete says that nothing is left to do, and results.has(case)
which cases are there already.

The file is {"machine": {...}, "results": [{"part", "case", "tool", "metric", "unit", "runs", "median"}]}. A run that
did not come to an end is null in "runs"; a row of nothing else has the median null. Under "machine", "parts" says for
each part when, of which commit and how it was measured, since parts may be run one by one, and if it is complete;
"errors" are its cells that have no figures, with what went wrong.
"""
import contextlib
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import time
import traceback

UNITS = {'ms': 'ms', 's': 's', 'bytes': 'B', 'pct': '%', 'MBps': 'MB/s'}
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


def machine():
    with open('/proc/cpuinfo', encoding='ascii', errors='replace') as file:
        model = re.search(r'model name\s*:\s*(.*)', file.read()).group(1)
    return {'cpu': model, 'cpus': os.cpu_count(), 'kernel': platform.release(),
            'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
            'versions': {name: found for name, argv in VERSIONS.items() if (found := version(*argv))}}


def describe(m):
    """What machine() says, in words."""
    return f'{m["cpus"]} cores of {m["cpu"]}, {m["memory_bytes"] / 2**30:.0f} GiB, Linux {m["kernel"]}'


# What the figures do not depend on. (The results themselves are written there.)
BESIDE = ['docs', 'README.md', *(f'tests/{name}' for name in ('fault', 'flow', 'fuzz', 'soak', 'unit'))]


def commit():
    """The last one that changed what is measured or how, and whether it was changed since."""
    measured = [':/', *(f':(top,exclude){path}' for path in BESIDE)]

    def git(*words):
        return subprocess.run(['git', '-C', os.path.dirname(__file__), *words, '--', *measured], capture_output=True,
                              text=True, check=True).stdout.strip()
    return git('log', '-1', '--format=%h') + ('-dirty' if git('status', '--porcelain') else '')


def row_key(row):
    return row['case'], row['tool'], row['metric']


class Results:
    """What one part has measured."""

    def __init__(self, part, quick, path, go_on=False):
        self.part, self.path, self.rows, self.errors = part, path, {}, []
        self.about = {'quick': quick, 'date': time.strftime('%Y-%m-%d', time.gmtime()), 'commit': commit()}
        self.began, self.complete = time.monotonic(), False
        if go_on:
            self.keep()

    def keep(self):
        said = load(self.path)
        about = said['machine'].get('parts', {}).get(self.part, {})
        if all(about.get(key) == self.about[key] for key in ('quick', 'commit')):
            self.rows = {row_key(row): row for row in said['results'] if row['part'] == self.part}
            self.began -= about['took_s']
            self.complete = about.get('complete', False)

    def has(self, case):
        return any(known == case for known, _, _ in self.rows)

    def add(self, case, tool, metric, runs):
        known = [run for run in runs if run is not None]
        row = {'part': self.part, 'case': case, 'tool': tool, 'metric': metric, 'unit': unit(metric), 'runs': runs,
               'median': statistics.median(known) if known else None}
        self.rows[row_key(row)] = row

    def add_all(self, case, tool, runs):
        """Of a list of {metric: value}, one for each run."""
        for metric in dict.fromkeys(metric for run in runs for metric in run):
            self.add(case, tool, metric, [run.get(metric) for run in runs])

    @contextlib.contextmanager
    def cell(self, what):
        """What goes wrong in it is told in the results; the rest is measured all the same."""
        try:
            yield
        except Exception as problem:  # pylint: disable=broad-except
            traceback.print_exc()
            self.errors.append(f'{what}: {type(problem).__name__}: {str(problem)[:200]}')

    def save(self):
        said = load(self.path)
        parts = said['machine'].get('parts', {})
        parts[self.part] = {**self.about, 'took_s': round(time.monotonic() - self.began), 'errors': self.errors,
                            'complete': self.complete}
        rows = [row for row in said['results'] if row['part'] != self.part] + list(self.rows.values())
        with open(self.path + '.new', 'w', encoding='ascii') as file:
            json.dump({'machine': {**machine(), 'parts': parts}, 'results': rows}, file, indent=1)
            file.write('\n')
        os.rename(self.path + '.new', self.path)

    def end(self):
        self.complete = not self.errors
        self.save()


def load(path):
    try:
        with open(path, encoding='ascii') as file:
            return json.load(file)
    except FileNotFoundError:
        return {'machine': {}, 'results': []}
