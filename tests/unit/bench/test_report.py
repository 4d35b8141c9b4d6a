#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""What the comparison says of its figures: tests/bench/suite, without plots."""
import contextlib
import io
import json
import os
import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / 'bench'))

from suite import report  # noqa: E402
from suite.results import Results, load  # noqa: E402


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = os.path.join(self.folder.name, 'SUITE.json')

    def save(self, part, *rows):
        results = Results(part, quick=True, path=self.path)
        for row in rows:
            results.add(*row)
        results.save()

    def page(self):
        return report.page(report.Suite(load(self.path)), {})

    def test_the_file_is_as_documented(self):
        self.save('migrate', ('1gbit/idle', 'vmmig-qemu', 'wire_bytes', [3, 1, 2]))
        with open(self.path, encoding='ascii') as file:
            said = json.load(file)
        self.assertEqual(said['results'], [{'part': 'migrate', 'case': '1gbit/idle', 'tool': 'vmmig-qemu',
                                            'metric': 'wire_bytes', 'unit': 'B', 'runs': [3, 1, 2], 'median': 2}])
        self.assertEqual(said['machine']['cpus'], os.cpu_count())
        self.assertTrue(said['machine']['parts']['migrate']['commit'])

    def test_a_part_that_is_not_run_stays(self):
        self.save('migrate', ('a', 'qemu-plain', 'total_ms', [1]))
        self.save('repo', ('b', 'restic', 'total_s', [1]))
        self.save('migrate', ('c', 'qemu-plain', 'total_ms', [2]))
        self.assertEqual([row['case'] for row in load(self.path)['results']], ['b', 'c'])

    def test_an_interrupted_run_is_gone_on_with(self):
        first = Results('migrate', quick=False, path=self.path)
        first.add('a', 'qemu-plain', 'total_ms', [1])
        first.save()
        again = Results('migrate', quick=False, path=self.path, go_on=True)
        self.assertTrue(again.has('a') and not again.has('b') and not again.complete)
        again.add('b', 'qemu-plain', 'total_ms', [2])
        again.end()
        self.assertEqual([row['case'] for row in load(self.path)['results']], ['a', 'b'])
        self.assertTrue(Results('migrate', quick=False, path=self.path, go_on=True).complete)

    def test_a_run_of_another_kind_or_commit_is_begun_anew(self):
        self.save('migrate', ('a', 'qemu-plain', 'total_ms', [1]))
        self.assertFalse(Results('migrate', quick=False, path=self.path, go_on=True).has('a'))
        said = load(self.path)
        said['machine']['parts']['migrate'] |= {'commit': 'another', 'complete': True}
        pathlib.Path(self.path).write_text(json.dumps(said), encoding='ascii')
        other = Results('migrate', quick=True, path=self.path, go_on=True)
        self.assertFalse(other.has('a') or other.complete)

    def test_a_part_with_errors_is_not_complete(self):
        results = Results('migrate', quick=True, path=self.path)
        with contextlib.redirect_stderr(io.StringIO()), results.cell('x'):
            raise OSError('no such thing')
        results.end()
        self.assertFalse(Results('migrate', quick=True, path=self.path, go_on=True).complete)

    def test_a_loss_is_bold_and_listed_and_a_tie_is_neither(self):
        self.save('migrate', ('x', 'vmmig-qemu', 'total_ms', [300]), ('x', 'qemu-plain', 'total_ms', [150]),
                  ('x', 'qemu-multifd', 'total_ms', [200]), ('x', 'vmmig-qemu', 'wire_bytes', [1010000]),
                  ('x', 'qemu-plain', 'wire_bytes', [1000000]))
        page = self.page()
        self.assertIn('| vmmig-qemu | **300 ×2.00** | 1.01 ×1.01 |', page)
        self.assertIn("- x, vmmig-qemu, total_ms: 2.00 of qemu-plain's", page)
        self.assertEqual(page.count('**'), 4, 'one figure, and the word in the page that explains it')

    def test_what_did_not_finish_is_no_figure(self):
        self.save('migrate', ('x', 'vmmig-qemu', 'total_ms', [300]), ('x', 'vmmig-qemu', 'finished', [1]),
                  ('x', 'qemu-plain', 'total_ms', [None]), ('x', 'qemu-plain', 'finished', [0]))
        self.assertIn('| qemu-plain | – | 0 |', self.page())
        self.assertNotIn('behind:', self.page())

    def test_what_goes_wrong_is_told_and_the_rest_is_kept(self):
        results = Results('repo', quick=True, path=self.path)
        results.add('disk', 'restic', 'total_s', [1])
        with contextlib.redirect_stderr(io.StringIO()), results.cell('round 2'):
            raise ValueError('the disk is full')
        results.save()
        self.assertIn('- round 2: ValueError: the disk is full', self.page())
        self.assertIn('| restic | 1 |', self.page())

    def test_stores_on_ceph_are_compared_with_each_other(self):
        self.save('repo', ('disk', 'vmmig-rados', 'total_s', [3]), ('disk', 'restic', 'total_s', [1]),
                  ('disk', 'rbd', 'total_s', [6]))
        self.assertIn('| vmmig-rados | 3 ×0.50 |', self.page())

    def test_every_part_says_how_it_measures(self):
        for part in report.TITLES:
            self.assertIn('What is measured', report.method(part)[0])

    def test_what_grows_faster_than_the_work_is_named(self):
        self.save('growth', *[(f'steep/{n}', 'vmmig-dir', 'collect_ms', [n * n]) for n in (1, 10, 100)],
                  *[(f'even/{n}', 'vmmig-dir', 'collect_ms', [n]) for n in (1, 10, 100)])
        page = self.page()
        self.assertIn('- steep, vmmig-dir, collect_ms: from 10 to 100 as the power 2.00 of the work', page)
        self.assertNotIn('- even', page)


if __name__ == '__main__':
    unittest.main()
