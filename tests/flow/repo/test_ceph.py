# SPDX-License-Identifier: Apache-2.0
"""What only Ceph can do to a repository."""
import os
import subprocess

import pytest

from .conftest import Failed, Repository, UNIT, build
from .test_repository import MIB, disk, same


@pytest.mark.parametrize('suite', ['store', 'index', 'repo', 'damage', 'template',
                                   *(pytest.param(suite, marks=pytest.mark.full) for suite in ('collect', 'repack'))])
def test_the_unit_suite_over_rados(ceph, suite):
    """The same tests that run over a folder."""
    done = subprocess.run([os.path.join(build(), UNIT, f'test_repo_{suite}')], text=True, timeout=300,
                          env=dict(os.environ, VMMIG_TEST_CEPH_CONF=ceph.conf),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_pool_that_does_not_exist(ceph):
    with pytest.raises(Failed) as failed:
        Repository(f'rados:nowhere?conf={ceph.conf}').run('init')
    assert failed.value.kind == 'not-found' and 'no pool "nowhere"' in failed.value.message


def test_a_user_that_does_not_exist(ceph):
    with pytest.raises(Failed) as failed:
        Repository(f'rados:images?conf={ceph.conf}&id=nobody').run('init')
    assert failed.value.kind == 'denied' and '\n' not in failed.value.text


def test_a_configuration_that_does_not_exist():
    with pytest.raises(Failed) as failed:
        Repository('rados:images?conf=/nonexistent').run('init')
    assert failed.value.kind == 'not-found' and '/nonexistent' in failed.value.message


def test_the_least_rights_that_suffice(ceph, tmp_path):
    """docs/repository.md names these; one tenant's user sees nothing of another's."""
    raw = disk(tmp_path / 'disk.raw', 8)
    confs = [ceph.create_user(f'client.tenant{i}', f'allow rw pool=images namespace=tenant{i}')
             for i in (1, 2)]
    ours = Repository(f'rados:images/tenant1?conf={confs[0]}&id=tenant1')
    ours.run('init')
    ours.run('import', raw, 'a')
    ours.run('export', 'a', tmp_path / 'out.raw')
    assert same(raw, tmp_path / 'out.raw')
    ours.run('delete', 'a')
    with pytest.raises(Failed) as failed:
        Repository(f'rados:images/tenant1?conf={confs[1]}&id=tenant2').run('list')
    assert failed.value.kind == 'denied'


def test_packs_in_an_erasure_coded_pool(ceph, ceph_url, tmp_path):
    ceph.command('osd erasure-code-profile set', name='k2m1',
                 profile=['k=2', 'm=1', 'crush-failure-domain=osd'])
    ceph.create_pool('packs', pool_type='erasure', erasure_code_profile='k2m1')
    raw = disk(tmp_path / 'disk.raw', 16)
    repository = Repository(ceph_url)
    repository.run('init', 'packs')
    repository.run('import', raw, 'a')
    io = ceph.rados.open_ioctx('packs')
    io.set_namespace(ceph_url.split('/')[1].split('?')[0])
    assert all(o.key.startswith('pack.') for o in io.list_objects()) and list(io.list_objects())
    io.close()
    repository.run('export', 'a', tmp_path / 'out.raw')
    assert same(raw, tmp_path / 'out.raw')
    repository.second_reader('check')


def test_an_osd_that_dies_and_a_monitor_that_restarts(ceph, ceph_url, tmp_path):
    raw = disk(tmp_path / 'disk.raw', 48)
    repository = Repository(ceph_url)
    repository.run('init')
    with repository.start('import', raw, 'a') as process:
        ceph.kill('osd.0')
        ceph.kill('mon.a')
        ceph.start_monitor()
        ceph.wait_osds(2)
        ceph.start_osd(0)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f'"size": {48 * MIB}' in out
    ceph.wait_osds(3)
    ceph.wait_clean()
    repository.run('export', 'a', tmp_path / 'out.raw')
    assert same(raw, tmp_path / 'out.raw')
    repository.second_reader('check')
