# SPDX-License-Identifier: Apache-2.0
"""Tests whose repository is in a folder, and with --full in Ceph, too."""
import contextlib

import pytest
from agents import Cluster

from repo.conftest import ceph_with

STORES = ['dir', pytest.param('rados', marks=pytest.mark.full)]


@contextlib.contextmanager
def cluster_on(store, folder):
    """A host that runs whatever is asked of it, whose agent's repository is to be there. Nothing is started, nor made."""
    with contextlib.ExitStack() as ends:
        cluster = ends.enter_context(Cluster(hosts=1, start=False, plain=True))
        if store == 'rados':
            ceph = ends.enter_context(ceph_with('images', folder, osds=2, network_of=cluster.hosts[0].pid))
            cluster.agents[0].options['repository'] = f'rados:images?conf={ceph.conf}'
        yield cluster
