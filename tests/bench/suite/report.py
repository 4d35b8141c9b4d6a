# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of a SUITE.json: README.md, and for each plot an SVG and a PNG, in the folder beside it; and, of the
README at the top, what lies between its two marks."""
import ast
import math
import pathlib
import re
import subprocess

from .explanations import explanation
from .results import describe as describe_hardware
from .results import load

ROOT = pathlib.Path(__file__).resolve().parents[3]
# Metrics of which more is better; of the others, less is.
MORE_IS_BETTER = ('finished', 'within_limit')
# What is said of a run, and is no tool's merit.
NOT_JUDGED = ('others_pct',)
# The work that was done, for bounds().
HIDDEN = ('memory_bytes', 'data_bytes', 'huge_MiB')
TITLES = {'limits': 'Limits of the machine', 'migrate': 'Migrations', 'repo': 'Repositories', 'clone': 'Clones',
          'dirtylog': 'Dirty tracking', 'growth': 'Growth'}
MODULES = {'migrate': 'migrations', 'repo': 'repository', 'clone': 'clones'}
ON_CEPH = ('vmmig-rados', 'rbd')
WORSE = 1.02  # below, it is a tie
SUPERLINEAR = 1.15
MARKS = '<!-- figures of tests/bench/run -->\n', '<!-- end of the figures -->\n'


def number(value, unit):
    if value is None:
        return '–'
    if unit == 'B':
        value, unit = value / 1e6, 'MB'
    return f'{value:.3g}' if abs(value) < 1000 else f'{value:.0f}'


def column(metric, unit):
    if unit == '1':
        return metric.replace('_', ' ')
    name = metric.rpartition('_')[0].replace('_', ' ')
    return f'{name}, {"MB" if unit == "B" else unit}'


class Suite:
    """The rows of a SUITE.json, to look up."""

    def __init__(self, said):
        self.machine = said['machine']
        self.parts = said['machine'].get('parts', {})
        self.rows = {(row['part'], row['case'], row['tool'], row['metric']): row for row in said['results']}

    def values(self, position, **chosen):
        """What there is at a position of (part, case, tool, metric), in order, among the rows chosen."""
        keys = ('part', 'case', 'tool', 'metric')
        return list(dict.fromkeys(key[keys.index(position)] for key in self.rows
                                  if all(key[keys.index(name)] == value for name, value in chosen.items())))

    def median(self, *key):
        row = self.rows.get(key)
        return row['median'] if row else None

    def unit(self, metric):
        return next(row['unit'] for key, row in self.rows.items() if key[3] == metric)


# ---- vmmig and its peers

def best_peer(suite, part, case, tool, metric):
    """(median, name) of the best peer of that tool of vmmig's; (None, None) without one."""
    medians = [(value, peer) for peer in suite.values('tool', part=part, case=case)
               if not peer.startswith('vmmig') and (peer in ON_CEPH) == (tool in ON_CEPH)
               and (value := suite.median(part, case, peer, metric)) is not None]
    return (max if metric in MORE_IS_BETTER else min)(medians, default=(None, None))


def ratio(suite, part, case, tool, metric):
    """vmmig's figure by the best peer's, or None."""
    best, own = best_peer(suite, part, case, tool, metric)[0], suite.median(part, case, tool, metric)
    if not tool.startswith('vmmig') or metric in NOT_JUDGED + HIDDEN or not best or own is None:
        return None
    return own / best


def loses(suite, part, case, tool, metric):
    found = ratio(suite, part, case, tool, metric)
    return found is not None and (found < 1 if metric in MORE_IS_BETTER else found > WORSE)


def spread(row):
    runs = [run for run in row['runs'] if run is not None]
    if len(runs) < 2:
        return ''
    return f' ({number(min(runs), row["unit"])}–{number(max(runs), row["unit"])})'


def cell(suite, key):
    row = suite.rows.get(key)
    if row is None:
        return ''
    text, found = number(row['median'], row['unit']), ratio(suite, *key)
    if found is not None and key[3] not in MORE_IS_BETTER:
        text += f' ×{found:.2f}'
    return (f'**{text}**' if loses(suite, *key) else text) + spread(row)


def table(suite, part, case):
    metrics = [metric for metric in suite.values('metric', part=part, case=case) if metric not in HIDDEN]
    yield f'| {case} | ' + ' | '.join(column(metric, suite.unit(metric)) for metric in metrics) + ' |'
    yield '|---' * (len(metrics) + 1) + '|'
    for tool in suite.values('tool', part=part, case=case):
        yield f'| {tool} | ' + ' | '.join(cell(suite, (part, case, tool, metric)) for metric in metrics) + ' |'


def series(suite, part):
    """Of cases like KIND/NUMBER, a table for each kind: a row for each number and tool."""
    kinds = {}
    for case in suite.values('case', part=part):
        kinds.setdefault(case.partition('/')[0], []).append(case)
    for kind, cases in kinds.items():
        metrics = list(dict.fromkeys(m for case in cases for m in suite.values('metric', part=part, case=case)))
        yield f'| {kind} | | ' + ' | '.join(column(metric, suite.unit(metric)) for metric in metrics) + ' |'
        yield '|---' * (len(metrics) + 2) + '|'
        for case in cases:
            for tool in suite.values('tool', part=part, case=case):
                yield (f'| {case.partition("/")[2]} | {tool} | '
                       + ' | '.join(cell(suite, (part, case, tool, metric)) for metric in metrics) + ' |')
        yield ''


def is_step(part, case):
    """What a store takes after each step is plotted, not tabled."""
    return part == 'repo' and '/' in case


def of_the_peer(suite, part, case, peer):
    """What else the tables say of a peer that is ahead, as it matters for who has to choose."""
    if part != 'migrate':
        return ''
    pause, within = (suite.median(part, case, peer, metric) for metric in ('pause_ms', 'within_limit'))
    late = '' if within in (None, 1) else ', over the limit'
    return f' (the guest stood still for {number(pause, "ms")} ms{late})'


def losses(suite, part):
    """A line for each figure in which vmmig is behind a peer, with its ratio and the reason."""
    for case in suite.values('case', part=part):
        for tool in suite.values('tool', part=part, case=case):
            for metric in suite.values('metric', part=part, case=case):
                if not is_step(part, case) and loses(suite, part, case, tool, metric):
                    _, peer = best_peer(suite, part, case, tool, metric)
                    yield (f'- {case}, {tool}, {metric}: {ratio(suite, part, case, tool, metric):.2f} of {peer}\'s'
                           f'{of_the_peer(suite, part, case, peer)}. {explanation(part, case, tool, metric, peer)}')


def slopes(suite):
    """Of the growth: where the cost grows faster than the work."""
    for name in dict.fromkeys(case.partition('/')[0] for case in suite.values('case', part='growth')):
        cases = sorted((float(case.partition('/')[2]), case) for case in suite.values('case', part='growth')
                       if case.startswith(name + '/'))
        for tool in dict.fromkeys(t for _, case in cases for t in suite.values('tool', part='growth', case=case)):
            for metric in suite.values('metric', part='growth', tool=tool):
                points = [(x, y) for x, case in cases if (y := suite.median('growth', case, tool, metric))]
                for (x0, y0), (x1, y1) in zip(points, points[1:]):
                    slope = math.log(y1 / y0) / math.log(x1 / x0)
                    if slope > SUPERLINEAR:
                        yield (f'- {name}, {tool}, {metric}: from {x0:g} to {x1:g} as the power {slope:.2f} '
                               'of the work')


# ---- how near the limits

LINKS = {'100mbit': 100e6 / 8, '1gbit': 1e9 / 8, '10gbit': 10e9 / 8}


def bounds(suite, part, case, tool):
    """{what limits: the seconds that the work takes at least, by the limits measured beside it}"""
    def limit(name):
        return suite.median('limits', 'limits', 'machine', f'{name}_MBps') * 1e6

    def figure(metric):
        return suite.median(part, case, tool, metric) or 0

    if part == 'migrate':
        wire, link = figure('wire_bytes'), case.partition('/')[0]
        if link in LINKS:
            return {'link': wire / LINKS[link]}
        return {'loopback_tcp': wire / limit('loopback_tcp'), 'memcpy': figure('memory_bytes') / limit('memcpy')}
    if part == 'repo' and case in ('disk', 'memory', 'versions', 'siblings', 'export'):
        codec = 'lz4_decompress' if case == 'export' else 'sha256'
        found = {codec: figure('data_bytes') / limit(codec)}
        if tool == 'vmmig-rados' and case in ('disk', 'export'):
            cluster = 'cluster_write' if case == 'disk' else 'cluster_read'
            found[cluster] = figure('stored_bytes') / limit(cluster)
        return found
    return {}


def shares(suite, part):
    """For each of vmmig's figures: the limit that is nearest and its share, and how busy the cores were meanwhile."""
    if 'limits' not in suite.parts:
        return
    for case in suite.values('case', part=part):
        for tool in [t for t in suite.values('tool', part=part, case=case) if t.startswith('vmmig')]:
            seconds = suite.median(part, case, tool, 'total_s') or \
                (suite.median(part, case, tool, 'total_ms') or 0) / 1000
            found = bounds(suite, part, case, tool)
            if not seconds or not found:
                continue
            name = max(found, key=found.get)
            cpu = sum(suite.median(part, case, tool, metric) or 0 for metric in ('cpu_s', 'cluster_cpu_s'))
            busy = 100 * cpu / suite.machine['cpus'] / seconds
            reached = 100 * found[name] / seconds
            binds = name if reached > busy else 'the cores'
            yield f'| {case} | {tool} | {name} | {reached:.0f} | {busy:.0f} | {binds} |'


def near(suite, part):
    rows = list(shares(suite, part))
    if not rows:
        return []
    return ['How near the limits: the one that is nearest, its share in the time, how busy the tool (and the cluster) '
            'kept the cores meanwhile, and which of the two binds.', '',
            '| | | limit | share, % | cores busy, % | binds |', '|---|---|---|---|---|---|', *rows, '']


# ---- the page

def describe_machine(suite):
    m = suite.machine
    versions = ', '.join(f'{name} {version}' for name, version in m['versions'].items())
    return f'{describe_hardware(m)}; {versions}.'


def describe(suite, part):
    m = suite.parts[part]
    return (f'{m["date"]}, {m["commit"]}, {m["took_s"]} s'
            f'{", a quick run: fewer links, loads, sizes and rounds" if m["quick"] else ""}.')


def method(part):
    """What the part's program says of itself."""
    program = pathlib.Path(__file__).with_name(f'{MODULES.get(part, part)}.py').read_text(encoding='utf-8')
    said = ast.get_docstring(ast.parse(program))
    return ['<details><summary>What is measured, and how</summary>', '', '```text', said.rstrip('\n'), '```', '',
            '</details>', '']


def page(suite, plots):
    lines = ['# vmmig beside its peers', '', 'Made by `tests/bench/run`, of SUITE.json; no figure is typed by hand. '
             'Medians, with the smallest and largest of the runs; × is vmmig\'s figure by that of the best of its '
             'peers. Where that is more than 1.02, it is **bold**.', '', describe_machine(suite), '']
    for part, title in TITLES.items():
        if part not in suite.parts:
            continue
        lines += [f'## {title}', '', describe(suite, part), '', *method(part)]
        for name, text in plots.get(part, []):
            lines += [f'![{text}]({name}.svg)', '']
        if part == 'growth':
            lines += [*series(suite, part), 'Faster than the work grows:', '',
                      *(list(slopes(suite)) or ['- nothing']), '']
            continue
        for case in suite.values('case', part=part):
            if not is_step(part, case):
                lines += [*table(suite, part, case), '']
        lines += near(suite, part)
        if behind := list(losses(suite, part)):
            lines += ['Where vmmig is behind:', '', *behind, '']
        if wrong := suite.parts[part]['errors']:
            lines += ['Not measured:', '', *(f'- {line}' for line in wrong), '']
    return '\n'.join(lines)


# ---- plots

def gnuplot(folder, name, title, script, data):
    for terminal, ending in (('svg size 900,450 font "sans,11" background "white"', 'svg'),
                             ('pngcairo size 900,450 font "sans,10"', 'png')):
        text = f'set terminal {terminal}\nset output "{folder / name}.{ending}"\nset title "{title}"\n' \
               f'set key outside right\n$data << EOD\n{data}\nEOD\n{script}\n'
        subprocess.run(['gnuplot'], input=text, text=True, check=True, capture_output=True)


def bars(suite, folder, name, title, part, metric, scale, label):
    """Groups of bars: a group for a case, a bar for a tool; the scale is logarithmic."""
    tools = suite.values('tool', part=part, metric=metric)
    rows = []
    for case in suite.values('case', part=part, metric=metric):
        values = [suite.median(part, case, tool, metric) for tool in tools]
        rows.append(' '.join([f'"{case}"', *('?' if value is None else f'{value / scale:.6g}' for value in values)]))
    gnuplot(folder, name, title, f'set style data histograms\nset style fill solid\nset datafile missing "?"\n'
            f'set ylabel "{label}"\nset logscale y\nset xtics rotate by -30\nset grid y\nplot '
            + ', '.join(f'$data using {i + 2}:xtic(1) title "{tool}"' for i, tool in enumerate(tools)), '\n'.join(rows))


def curves(_, folder, name, title, xlabel, ylabel, lines, log=True):
    """lines: {name: [(x, y)]}"""
    blocks = '\n\n\n'.join('\n'.join(f'{x} {y}' for x, y in points) for points in lines.values())
    gnuplot(folder, name, title, ('set logscale xy\n' if log else '')
            + f'set xlabel "{xlabel}"\nset ylabel "{ylabel}"\nset grid\nplot '
            + ', '.join(f'$data index {i} with linespoints title "{line}"' for i, line in enumerate(lines)), blocks)


def growth_lines(suite, name, metrics):
    lines = {}
    for case in suite.values('case', part='growth'):
        kind, _, x = case.partition('/')
        if kind == name:
            for tool in suite.values('tool', part='growth', case=case):
                for metric in metrics:
                    if y := suite.median('growth', case, tool, metric):
                        lines.setdefault(f'{tool} {metric.rpartition("_")[0].replace("_", " ")}', []).append((x, y))
    return lines


def steps(suite, kind):
    """{tool: [(step, MB stored after it)]}"""
    lines = {}
    for case in suite.values('case', part='repo'):
        if case.startswith(kind + '/'):
            for tool in suite.values('tool', part='repo', case=case):
                stored = suite.median('repo', case, tool, 'stored_bytes')
                lines.setdefault(tool, []).append((int(case.partition('/')[2]), stored / 1e6))
    return lines


def tracked(suite, share):
    """{driver: [(GiB, ms to read and to clear the log with so many percent of the pages dirty)]}"""
    lines = {}
    for case in suite.values('case', part='dirtylog'):
        for tool in suite.values('tool', part='dirtylog', case=case):
            y = sum(suite.median('dirtylog', case, tool, f'{what}_{share}_ms') for what in ('harvest', 'clear'))
            lines.setdefault(tool, []).append((float(case.removesuffix('GiB')), y))
    return lines


def plot(suite, folder):
    """Makes all plots. Returns {part: [(name, title)]}."""
    made = {}

    def add(part, name, title, make, *arguments):
        make(suite, folder, name, title, *arguments)
        made.setdefault(part, []).append((name, title))

    if suite.values('case', part='migrate'):
        add('migrate', 'migrate-total', 'Migration: total time', bars, 'migrate', 'total_ms', 1000, 's')
        add('migrate', 'migrate-pause', 'Migration: the guest stands still', bars, 'migrate', 'pause_ms', 1, 'ms')
        add('migrate', 'migrate-wire', 'Migration: bytes on the wire', bars, 'migrate', 'wire_bytes', 1e6, 'MB')
    if suite.values('case', part='repo'):
        add('repo', 'repo-total', 'Repository: time of each step', bars, 'repo', 'total_s', 1, 's')
        for kind in ('versions', 'siblings'):
            add('repo', f'repo-{kind}', f'Repository: stored after each of the {kind}', curves, kind, 'MB',
                steps(suite, kind), False)
    if suite.values('case', part='clone'):
        add('clone', 'clone-start', 'Clones: from exec to a running guest', bars, 'clone', 'start_ms', 1, 'ms')
    if suite.values('case', part='dirtylog'):
        for share in (1, 10, 100):
            add('dirtylog', f'dirtylog-{share}', f'Dirty tracking: to read and clear the log, {share} % dirty', curves,
                'GiB of memory', 'ms', tracked(suite, share))
    for name, metrics, xlabel, ylabel in (('memory-filled', ['total_ms'], 'MiB of memory', 'ms'),
                                          ('memory-sparse', ['total_ms'], 'MiB of memory', 'ms'),
                                          ('images', ['import_ms', 'list_ms', 'collect_ms'], 'images', 'ms'),
                                          ('unique', ['share_s', 'collect_s'], 'GiB of unique data', 's')):
        if lines := growth_lines(suite, name, metrics):
            add('growth', f'growth-{name}', f'Growth: {name}', curves, xlabel, ylabel, lines)
    return made


# ---- the README

def summary(suite):
    """For the README: each case of the migrations, and each step of the repository, vmmig's medians and the best
    peer's."""
    for part, metrics in (('migrate', ('total_ms', 'pause_ms', 'wire_bytes', 'cpu_s')),
                          ('repo', ('total_s', 'stored_bytes'))):
        if part not in suite.parts:
            continue
        yield '| | | ' + ' | '.join(column(metric, suite.unit(metric)) for metric in metrics) + ' |'
        yield '|---' * (len(metrics) + 2) + '|'
        for case in suite.values('case', part=part):
            for tool in suite.values('tool', part=part, case=case):
                if is_step(part, case) or not tool.startswith('vmmig'):
                    continue
                cells = []
                for metric in metrics:
                    own = number(suite.median(part, case, tool, metric), suite.unit(metric))
                    own = f'**{own}**' if loses(suite, part, case, tool, metric) else own
                    cells.append(f'{own} : {number(best_peer(suite, part, case, tool, metric)[0], suite.unit(metric))}')
                yield f'| {case} | {tool} | ' + ' | '.join(cells) + ' |'
        yield ''


def write_readme(suite, folder):
    path = ROOT / 'README.md'
    text = path.read_text(encoding='utf-8')
    if MARKS[0] not in text or folder.resolve() != ROOT / 'docs/bench':
        return
    lines = ['vmmig : the best of its peers, medians; **bold** where it is behind. All of it, and why: '
             '[docs/bench](docs/bench/README.md).', '', describe_machine(suite), '', *summary(suite)]
    lines += [f'![{title}](docs/bench/{name}.svg)\n' for name, title in
              (('migrate-total', 'total time of migrations'), ('repo-versions', 'stored after each version'))]
    between = MARKS[0] + '\n' + '\n'.join(lines) + '\n' + MARKS[1]
    path.write_text(re.sub(re.escape(MARKS[0]) + '.*' + re.escape(MARKS[1]), lambda _: between, text, flags=re.S),
                    encoding='utf-8')


def write(path, folder):
    suite = Suite(load(path))
    plots = plot(suite, folder)
    made = [name for names in plots.values() for name, _ in names]
    for old in [*folder.glob('*.svg'), *folder.glob('*.png')]:
        if old.stem not in made:
            old.unlink()
    (folder / 'README.md').write_text(page(suite, plots) + '\n', encoding='utf-8')
    write_readme(suite, folder)
