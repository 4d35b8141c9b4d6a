# SPDX-License-Identifier: Apache-2.0
"""A repository's objects as they lie on the store, to be looked at and to be damaged: both drivers."""
import os
import sys

TESTS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(TESTS, 'repo_reader'))

import reader  # noqa: E402


def objects(url):
    return DirObjects(url[4:]) if url.startswith('dir:') else RadosObjects(url)


class DirObjects:
    def __init__(self, folder):
        self.folder = folder

    def path(self, name):
        area = 'packs' if name.startswith('pack.') else 'blobs'
        for sub in os.listdir(f'{self.folder}/{area}'):
            path = f'{self.folder}/{area}/{sub}/{name}'
            if os.path.exists(path):
                return path
        raise FileNotFoundError(name)

    def names(self, prefix):
        return sorted(name for area in ('packs', 'blobs')
                      for _, _, names in os.walk(f'{self.folder}/{area}')
                      for name in names if name.startswith(prefix))

    def read(self, name):
        with open(self.path(name), 'rb') as f:
            return f.read()

    def write(self, name, data):
        path = self.path(name)
        os.chmod(path, 0o600)
        with open(path, 'wb') as f:
            f.write(data)

    def remove(self, name):
        os.unlink(self.path(name))

    def maps(self, change):
        import lmdb
        env = lmdb.open(self.folder + '/maps', lock=True, max_dbs=0)
        with env.begin(write=True) as txn:
            result = change(txn)
        env.close()
        return result

    def pairs(self, name):
        def collect(txn):
            prefix, found = name.encode() + b'\0', {}
            with txn.cursor() as cursor:
                if cursor.set_range(prefix):
                    for key, value in cursor:
                        if not key.startswith(prefix):
                            break
                        if key != prefix:
                            found[key[len(prefix):].decode(errors='surrogateescape')] = bytes(value)
            return found
        return self.maps(collect)

    def set(self, name, key, value):
        self.maps(lambda txn: txn.put(name.encode() + b'\0' + key.encode(errors='surrogateescape'), value))

    def remove_map(self, name):
        def drop(txn):
            prefix = name.encode() + b'\0'
            with txn.cursor() as cursor:
                while cursor.set_range(prefix) and cursor.key().startswith(prefix):
                    cursor.delete()
        self.maps(drop)


class RadosObjects:
    def __init__(self, url):
        self.store = reader.open_store(url)

    def names(self, prefix):
        return sorted(o.key for o in self.store.meta.list_objects() if o.key.startswith(prefix))

    def read(self, name):
        return self.store.read('packs' if name.startswith('pack.') else 'blobs', name)

    def write(self, name, data):
        self.store.meta.write_full(name, data)

    def remove(self, name):
        self.store.meta.remove_object(name)

    def pairs(self, name):
        return {key: bytes(value) for key, value in self.store.pairs(name)}

    def set(self, name, key, value):
        with self.store.rados.WriteOpCtx() as op:
            self.store.meta.set_omap(op, (key,), (value,))
            self.store.meta.operate_write_op(op, name)

    def remove_map(self, name):
        self.store.meta.remove_object(name)
