# SPDX-License-Identifier: Apache-2.0
"""What dirty tracking costs: tests/bench/tracking.c, for every driver over the size of the guest. Case: GiB. Each
figure is the smallest of three: start and first of a guest's whole memory, harvest (reading the log) and clear when so many
percent of the pages are dirty, and by how much a guest that writes all the time is slower (slowdown: 0.3 is 30 %)."""
import attach


def run(results, quick, _):
    for row in attach.tracking((1, 4) if quick else (1, 4, 16)):
        driver, gib = row.pop('driver'), row.pop('gib')
        for metric, value in row.items():
            results.add(f'{gib}GiB', f'vmmig-{driver}', metric, [value])
