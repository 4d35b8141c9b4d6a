#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A second reader of vmmig's repositories, written from docs/repository-format.md alone, for the tests.

    reader.py dir:/FOLDER | rados:POOL[/NAMESPACE]?conf=FILE   list | check | read IMAGE FILE OUTPUT

`check` reads every page of every image and compares SHA-256, which the program itself does in a scrub only. It
needs python3-lmdb (dir) or python3-rados, python3-lz4, python3-xxhash and python3-zstandard.
"""
import hashlib
import struct
import sys
import urllib.parse

PAGE = 4096
LEAF_PAGES = 1024
LEAF = LEAF_PAGES * PAGE
FANOUT = 256


class Damaged(Exception):
    pass


def need(condition, what):
    if not condition:
        raise Damaged(what)


# ---- stores


class DirStore:
    def __init__(self, folder):
        import lmdb
        self.folder = folder
        self.env = lmdb.open(folder + "/maps", readonly=True, lock=True, max_dbs=0)

    def read(self, area, name, offset=0, length=None):
        h = 2166136261
        for byte in name.encode():
            h = (h ^ byte) * 16777619 & 0xffffffff
        sub = (h ^ h >> 8 ^ h >> 16) % 256
        with open(f"{self.folder}/{area}/{sub:02x}/{name}", "rb") as f:
            if offset < 0:
                f.seek(offset, 2)
            else:
                f.seek(offset)
            return f.read() if length is None else f.read(length)

    def pairs(self, name):
        prefix = name.encode() + b"\0"
        with self.env.begin() as txn, txn.cursor() as cursor:
            if not cursor.set_range(prefix):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                if key != prefix:
                    yield key[len(prefix):].decode(), value


class RadosStore:
    def __init__(self, pool, namespace, conf, user):
        import rados
        self.rados = rados
        self.cluster = rados.Rados(conffile=conf or "", rados_id=user or "admin")
        self.cluster.connect()
        self.namespace = namespace
        self.meta = self.open(pool)
        data_pool = dict(self.pairs("repository")).get("data-pool")
        self.data = self.open(data_pool.decode()) if data_pool else self.meta

    def open(self, pool):
        io = self.cluster.open_ioctx(pool)
        io.set_namespace(self.namespace)
        return io

    def read(self, area, name, offset=0, length=None):
        io = self.data if area == "packs" else self.meta
        size = io.stat(name)[0]
        offset = max(0, size + offset) if offset < 0 else offset
        length = size - offset if length is None else min(length, size - offset)
        out = b""
        while len(out) < length:
            out += io.read(name, length - len(out), offset + len(out))
        return out

    def pairs(self, name):
        after = ""
        while True:
            with self.rados.ReadOpCtx() as op:
                found, _ = self.meta.get_omap_vals(op, after, "", 500)
                try:
                    self.meta.operate_read_op(op, name)
                except self.rados.ObjectNotFound:
                    return
                some = list(found)
            yield from some
            if len(some) < 500:
                return
            after = some[-1][0]


def open_store(url):
    scheme, rest = url.split(":", 1)
    if scheme == "dir":
        return DirStore(urllib.parse.unquote(rest))
    names, _, query = rest.partition("?")
    pool, _, namespace = names.partition("/")
    options = dict(urllib.parse.parse_qsl(query))
    return RadosStore(pool, namespace, options.get("conf"), options.get("id"))


# ---- the format


class Repository:
    def __init__(self, url):
        import xxhash
        self.xxh3 = xxhash.xxh3_64_intdigest
        self.store = open_store(url)
        head = dict(self.store.pairs("repository"))
        need(head.get("format") == b"1", "not format 1")
        self.uuid = bytes.fromhex(head["uuid"].decode().replace("-", ""))
        self.footers = {}
        self.forwardings = {}
        self.records = {}
        self.bad = self.quarantine()

    # catalogue

    def images(self):
        for shard in range(256):
            for key, value in self.store.pairs(f"cat.{shard:02x}"):
                if key.startswith("n:"):
                    yield key[2:], self.parse_image(key[2:], value)

    def parse_image(self, name, value):
        value, check = value[:-8], value[-8:]
        seed = self.xxh3(name.encode())
        need(check == struct.pack("<Q", self.xxh3(value, seed=seed)), f"entry of image {name}")
        version, n_files, zero, created, writer, added = struct.unpack_from("<HHIQQQ", value)
        need(version == 2 and zero == 0, "image version")
        at = 32
        length = value[at]
        parent = value[at + 1:at + 1 + length].decode()
        at += 1 + length
        files = {}
        for _ in range(n_files):
            length = value[at]
            name = value[at + 1:at + 1 + length].decode()
            at += 1 + length
            size, tree, offset, node_len, check = struct.unpack_from("<QQIIQ", value, at)
            at += 32
            files[name] = (size, (tree, offset, node_len, check))
        need(at == len(value), "bytes behind an image")
        return {"created": created, "writer": writer, "added": added, "parent": parent,
                "files": files}

    # recipes

    def node(self, ref):
        tree, offset, length, check = ref
        data = self.store.read("blobs", f"tree.{tree:016x}", offset, length)
        need(len(data) == length and self.xxh3(data, seed=tree) == check, f"node of tree {tree:x}")
        return data

    def leaves(self, ref, level):
        """(position, leaf) below a node, position in leaves; what is zero is left out."""
        if ref[2] == 0:
            need(ref == (0, 0, 0, 0), "reference to zeros")
            return
        data = self.node(ref)
        need(data[0] == level and data[1] == 0, "level")
        if level == 0:
            yield 0, self.leaf(data)
            return
        count, zero = struct.unpack_from("<HI", data, 2)
        need(zero == 0 and 0 < count <= FANOUT and len(data) == 8 + 24 * count, "inner node")
        for i in range(count):
            child = struct.unpack_from("<QIIQ", data, 8 + 24 * i)
            for position, leaf in self.leaves(child, level - 1):
                yield i * FANOUT ** (level - 1) + position, leaf

    @staticmethod
    def leaf(data):
        """For each page None or (pack, offset, length, page, first bytes of the identity)."""
        n_packs, n_runs, zero = struct.unpack_from("<HHH", data, 2)
        need(zero == 0, "leaf")
        packs = struct.unpack_from(f"<{n_packs}Q", data, 8)
        at, pages = 8 + 8 * n_packs, []
        for _ in range(n_runs):
            count, = struct.unpack_from("<H", data, at)
            at += 2
            if count & 0x8000:
                pages += [None] * (count & 0x7fff)
                continue
            pack, offset, length, first = struct.unpack_from("<HIHB", data, at)
            at += 9
            pages += [(packs[pack], 8 * offset, 8 * length, first + i) for i in range(count)]
        need(len(pages) <= LEAF_PAGES, "pages of a leaf")
        for i, page in enumerate(pages):
            if page:
                pages[i] = page + (data[at:at + 4],)
                at += 4
        need(at == len(data), "bytes behind a leaf")
        return pages

    # packs

    def footer(self, pack):
        """offset of a record -> identities of its pages"""
        if pack in self.footers:
            return self.footers[pack]
        name = f"pack.{pack:016x}"
        header = self.store.read("packs", name, 0, 32)
        need(header == b"VMMIGPK1" + struct.pack("<Q", pack) + self.uuid, f"header of {name}")
        trailer = self.store.read("packs", name, -32)
        n_records, n_pages, number, magic, check = struct.unpack("<IIQ8sQ", trailer)
        need(magic == b"VMMIGPKE" and number == pack, f"trailer of {name}")
        data = self.store.read("packs", name, -(12 * n_records + 32 * n_pages + 32))
        need(self.xxh3(data[:-8], seed=pack) == check, f"footer of {name}")
        records, at = {}, 12 * n_records
        for i in range(n_records):
            offset, length, count, codec, mask = struct.unpack_from("<IIBBH", data, 12 * i)
            need(codec <= 2, f"codec in the footer of {name}")
            records[8 * offset] = [data[at + 32 * j:at + 32 * j + 32] for j in range(count)]
            at += 32 * count
        need(at == len(data) - 32, f"identities of {name}")
        self.footers[pack] = records
        return records

    def record(self, pack, offset, length):
        """The pages of a record; the last ones read are kept."""
        if (pack, offset) not in self.records:
            if len(self.records) > 64:
                self.records.clear()
            self.records[pack, offset] = self.read_record(pack, offset, length)
        return self.records[pack, offset]

    def read_record(self, pack, offset, length):
        import lz4.block
        import zstandard
        data = self.store.read("packs", f"pack.{pack:016x}", offset, length)
        check, payload, codec, count, mask = struct.unpack_from("<QIBBH", data)
        need(0 < count <= 16 and payload <= len(data) - 16, "record")
        need(self.xxh3(data[8:16 + payload], seed=(pack + offset) % 2**64) == check,
             f"record at {offset} of pack {pack:x}")
        body = data[16:16 + payload]
        if codec == 1:
            body = lz4.block.decompress(body, uncompressed_size=count * PAGE)
        elif codec == 2:
            body = zstandard.ZstdDecompressor().decompress(body, max_output_size=count * PAGE)
        need(len(body) == count * PAGE and codec <= 2, "payload")
        return [body[i * PAGE:i * PAGE + PAGE] for i in range(count)]

    # where pages are by now

    def quarantine(self):
        """(pack, offset) of damaged records; packs that are damaged as a whole can be read."""
        bad = set()
        for name, value in self.store.pairs("quarantine"):
            need(name.startswith("pack.") and len(value) % 4 == 0, "quarantine")
            for offset, in struct.iter_unpack("<I", value[8:]):
                bad.add((int(name[5:], 16), 8 * offset))
        return bad

    def forwarding(self, pack):
        """(offset, page) -> (pack, offset, length, page)"""
        if pack not in self.forwardings:
            shard = 2166136261
            for byte in f"pack.{pack:016x}".encode():
                shard = (shard ^ byte) * 16777619 & 0xffffffff
            value = dict(self.store.pairs(f"cat.{shard % 256:02x}")).get(f"f:{pack:016x}")
            self.forwardings[pack] = self.parse_forwarding(pack, value) if value else {}
        return self.forwardings[pack]

    def parse_forwarding(self, pack, value):
        version, n_packs, n_runs = struct.unpack_from("<HHI", value)
        need(version == 1 and n_runs and len(value) == 8 + 8 * n_packs + 16 * n_runs + 8,
             f"forwarding of {pack:x}")
        need(self.xxh3(value[:-8], seed=pack) == struct.unpack("<Q", value[-8:])[0],
             f"forwarding of {pack:x}")
        packs = struct.unpack_from(f"<{n_packs}Q", value, 8)
        places = {}
        for run in struct.iter_unpack("<IBBHIHBB", value[8 + 8 * n_packs:-8]):
            offset, first, count, which, to, length, to_first, zero = run
            need(zero == 0 and count, f"forwarding of {pack:x}")
            for i in range(count):
                places[8 * offset, first + i] = packs[which], 8 * to, 8 * length, to_first + i
        return places

    def locate(self, place):
        """The place itself, or where its forwarding says."""
        pack, offset, _, number = place
        if (pack, offset) not in self.bad:
            try:
                self.record(*place[:3])
                return place
            except (Damaged, FileNotFoundError) as problem:
                cause = problem
            except Exception as problem:  # the module for rados is imported only with a rados: URL
                need(type(problem).__name__ == "ObjectNotFound", f"reading {pack:x}: {problem}")
                cause = problem
        else:
            cause = "quarantined"
        to = self.forwarding(pack).get((offset, number))
        need(to, f"pack {pack:x}, record at {offset}, page {number}: {cause}, and not forwarded")
        return to

    # files

    def pages(self, size, root):
        """(number, content) of every page of a file that is not zero, its SHA-256 compared."""
        depth, span = 0, LEAF
        while span < size:
            depth, span = depth + 1, span * FANOUT
        last = None, None
        for position, leaf in self.leaves(root, depth):
            for i, page in enumerate(leaf):
                if not page:
                    continue
                prefix = page[4]
                if last[0] != page[:2]:
                    last = page[:2], self.locate(page[:4])[:2] == page[:2]
                place = page[:4] if last[1] else self.locate(page[:4])
                pack, offset, length, number = place
                content = self.record(pack, offset, length)[number]
                identity = hashlib.sha256(content).digest()
                need(identity == self.footer(pack)[offset][number], "identity in the footer")
                need(identity[:4] == prefix, "identity in the recipe")
                yield position * LEAF_PAGES + i, content


def main():
    repository = Repository(sys.argv[1])
    verb = sys.argv[2]
    if verb == "list":
        for name, image in sorted(repository.images()):
            print(name, *(f"{file}:{size}" for file, (size, _) in image["files"].items()))
    elif verb == "check":
        for name, image in repository.images():
            for size, root in image["files"].values():
                n = sum(1 for _ in repository.pages(size, root))
                print(f"{name}: {n} pages are right")
    elif verb == "read":
        size, root = dict(repository.images())[sys.argv[3]]["files"][sys.argv[4]]
        with open(sys.argv[5], "xb") as out:
            out.truncate((size + PAGE - 1) // PAGE * PAGE)
            for number, content in repository.pages(size, root):
                out.seek(number * PAGE)
                out.write(content)
            out.truncate(size)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
