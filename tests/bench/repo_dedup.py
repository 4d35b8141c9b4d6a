#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""What a repository makes of a disk and of the memory of two machines booted from it.

    repo_dedup.py BUILD FOLDER [--source TREE] [--mib DISK] [--memory MIB] [--ceph CONF]

The disk is an ext4 file system filled from TREE (default /usr/lib and /usr/bin of this machine). The memories are
made from its pages, always the same way: runs of pages as a page cache has them, zeros, and pages of their own, of
which a part is the same in both machines. Prints for each image size, rate, stored bytes and what sharing cost, and at
the end the stored bytes against all unique pages in LZ4 blocks of 64 KiB without any metadata.
"""
import argparse
import hashlib
import json
import os
import random
import subprocess

PAGE = 4096


def make_disk(path, tree, mib):
    if os.path.exists(path):
        return
    stage = path + ".tree"
    os.makedirs(stage, exist_ok=True)
    budget, copied = mib * 6 // 10 << 20, 0
    for top in tree:
        for folder, _, files in sorted(os.walk(top)):
            for name in sorted(files):
                source = os.path.join(folder, name)
                if os.path.islink(source) or not os.path.isfile(source):
                    continue
                copied += os.path.getsize(source)
                if copied > budget:
                    break
                target = stage + source
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(source, "rb") as a, open(target, "wb") as b:
                    b.write(a.read())
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", stage, path, f"{mib}M"], check=True)
    subprocess.run(["rm", "-rf", stage], check=True)


def own_page(rng):
    """A page of a heap: pointers into one region, small numbers, zeros."""
    base = 0x7f0000000000 + rng.randrange(1 << 28)
    words = []
    for _ in range(512):
        kind = rng.randrange(4)
        words.append(0 if kind < 2 else base + rng.randrange(1 << 16) * 8 if kind == 2
                     else rng.randrange(1 << 20))
    return b"".join(word.to_bytes(8, "little") for word in words)


def make_memory(path, disk, mib, seed):
    if os.path.exists(path):
        return
    rng, common = random.Random(seed), random.Random(7)
    pages, disk_pages = mib * 256, os.path.getsize(disk) // PAGE
    shared_pool = [own_page(common) for _ in range(pages // 10)]
    boot = random.Random(8)  # both machines read the same files at boot
    with open(disk, "rb") as source, open(path, "wb") as out:
        n = 0
        while n < pages:
            kind = rng.randrange(100)
            run = min(rng.choice((1, 2, 4, 8, 16, 32, 64)), pages - n)
            if kind < 45:
                who = boot if kind < 30 else rng
                source.seek(who.randrange(disk_pages - run) * PAGE)
                out.write(source.read(run * PAGE))
            elif kind < 65:
                out.write(bytes(run * PAGE))
            elif kind < 85:
                out.write(b"".join(rng.choice(shared_pool) for _ in range(run)))
            else:
                out.write(b"".join(own_page(rng) for _ in range(run)))
            n += run


def by_hand(paths):
    """Unique pages, in the order in which they come, in LZ4 blocks of sixteen."""
    import lz4.block
    seen, block, total, unique = set(), [], 0, 0
    for path in paths:
        with open(path, "rb") as f:
            while page := f.read(PAGE):
                identity = hashlib.sha256(page).digest()
                if not any(page) or identity in seen:
                    continue
                seen.add(identity)
                unique += 1
                block.append(page)
                if len(block) == 16:
                    total += len(lz4.block.compress(b"".join(block), store_size=False))
                    block = []
    return unique, total + (len(lz4.block.compress(b"".join(block))) if block else 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build")
    parser.add_argument("folder")
    parser.add_argument("--source", nargs="*", default=["/usr/lib", "/usr/bin"])
    parser.add_argument("--mib", type=int, default=1536)
    parser.add_argument("--memory", type=int, default=512)
    parser.add_argument("--ceph")
    args = parser.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    disk = os.path.join(args.folder, "disk.raw")
    make_disk(disk, args.source, args.mib)
    memories = [os.path.join(args.folder, f"memory{i}.raw") for i in (1, 2)]
    for i, path in enumerate(memories):
        make_memory(path, disk, args.memory, i + 1)

    tool = os.path.join(args.build, "tests/unit/repo/repo_tool")
    url = f"rados:images/bench?conf={args.ceph}" if args.ceph else f"dir:{args.folder}/repo"

    def run(*words):
        out = subprocess.run([tool, url, *words], check=True, stdout=subprocess.PIPE, text=True).stdout
        return [json.loads(line) for line in out.splitlines()]

    subprocess.run(["rm", "-rf", f"{args.folder}/repo"], check=True)
    run("init")
    print(f"{'image':10} {'MiB':>6} {'MB/s':>6} {'stored MB':>10} {'new':>8} {'shared':>8} {'again':>7} "
          f"{'footers':>8} {'RSS MiB':>8}")
    for name, path in [("disk", disk), ("memory1", memories[0]), ("memory2", memories[1]),
                       ("disk-again", disk), ("memory1-again", memories[0])]:
        r, = run("import", path, name, "raw")
        print(f"{name:10} {r['size'] >> 20:6} {r['size'] / 1e6 / r['seconds']:6.0f} {r['stored'] / 1e6:10.2f} "
              f"{r['new']:8} {r['shared']:8} {r['again']:7} {r['footers']:8} {r['rss_kib'] >> 10:8}")
    for name, path in [("disk", disk), ("memory2", memories[1])]:
        out = os.path.join(args.folder, "out.raw")
        subprocess.run(["rm", "-f", out], check=True)
        r, = run("export", name, out)
        subprocess.run(["cmp", out, path], check=True)
        print(f"export {name}: {os.path.getsize(path) / 1e6 / r['seconds']:.0f} MB/s, "
              f"{r['cpu']:.2f} s of CPU, read {r.get('read', 0) / 1e6:.1f} MB")
        os.unlink(out)
    stat, = run("stat")
    stored = stat["pack_bytes"] + stat["tree_bytes"]
    maps = 0
    if not args.ceph:
        maps = os.stat(f"{args.folder}/repo/maps/data.mdb").st_blocks * 512
    unique, hand = by_hand([disk, *memories])
    print(f"unique pages {unique} ({unique * PAGE / 1e6:.0f} MB), by hand {hand / 1e6:.1f} MB; stored: packs "
          f"{stat['pack_bytes'] / 1e6:.1f} MB, trees {stat['tree_bytes'] / 1e6:.2f} MB, maps {maps / 1e6:.1f} MB; ratio "
          f"{stored / hand:.3f} ({(stored + maps) / hand:.3f} with maps)")


if __name__ == "__main__":
    main()
