# SPDX-License-Identifier: Apache-2.0
"""Repositories over both stores, and the program that drives them."""
import contextlib
import json
import os
import subprocess
import sys

import pytest

TESTS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ROOT = os.path.dirname(TESTS)
sys.path.insert(0, os.path.join(TESTS, 'ceph'))

import cluster as ceph_cluster  # noqa: E402

UNIT = 'tests/unit/repo'
READER = os.path.join(TESTS, 'repo_reader', 'reader.py')


def build():
    return os.environ.get('VMMIG_BUILD', os.path.join(ROOT, 'build'))


def fault_build():
    return os.environ.get('VMMIG_FAULTS_BUILD', os.path.join(ROOT, 'build-faults'))


class Failed(Exception):
    """A command that failed: its exit status, the kind of the error, the message."""

    def __init__(self, status, text):
        self.status = status
        self.text = text.strip()
        self.kind, _, self.message = self.text.partition(': ')
        super().__init__(f'status {self.status}: {self.text}')


class Repository:
    """A repository, and repo_tool's verbs on it."""

    def __init__(self, url):
        self.url = url

    def start(self, *words, faults=None):
        folder = fault_build() if faults else build()
        env = dict(os.environ, **({'VMMIG_FAULTS': faults} if faults else {}))
        return subprocess.Popen([os.path.join(folder, UNIT, 'repo_tool'), self.url, *map(str, words)],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def run(self, *words, faults=None):
        """The lines of the answer, decoded."""
        with self.start(*words, faults=faults) as process:
            out, errors = process.communicate(timeout=120)
        if process.returncode:
            raise Failed(process.returncode, errors)
        return [json.loads(line) for line in out.splitlines()]

    def names(self):
        return sorted(line['name'] for line in self.run('list'))

    def second_reader(self, *words):
        done = subprocess.run([sys.executable, READER, self.url, *map(str, words)], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextlib.contextmanager
def ceph_with(pool, folder, **options):
    """A cluster with that pool; skips the test where Ceph is not installed."""
    lacking = ceph_cluster.missing()
    if lacking:
        pytest.skip(f'no Ceph: {", ".join(lacking)} not installed')
    with ceph_cluster.CephCluster(folder, **options) as running:
        running.create_pool(pool)
        yield running


@pytest.fixture(scope='session')
def ceph(tmp_path_factory):
    with ceph_with('images', tmp_path_factory.mktemp('ceph')) as running:
        yield running


@pytest.fixture
def ceph_url(ceph, request):
    """A namespace of its own for the test."""
    name = ''.join(c if c.isalnum() else '-' for c in request.node.name)
    return f'rados:images/{name}?conf={ceph.conf}'


@pytest.fixture(params=['dir', 'rados'])
def repository(request, tmp_path):
    """An empty repository, on each store."""
    url = f'dir:{tmp_path}/repo' if request.param == 'dir' else request.getfixturevalue('ceph_url')
    repo = Repository(url)
    repo.run('init')
    return repo


@pytest.fixture
def dir_repository(tmp_path):
    repo = Repository(f'dir:{tmp_path}/repo')
    repo.run('init')
    return repo
