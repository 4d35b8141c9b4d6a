# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of a SUITE.json: README.md, and for each plot an SVG and a PNG, in the folder beside it; and, of the
README at the top, what lies between its two marks."""
import math
import pathlib
import re
import subprocess

from .explanations import explanation
from .results import load

ROOT = pathlib.Path(__file__).resolve().parents[3]
# Metrics of which more is better; of the others, less is.
MORE_IS_BETTER = ('converged',)
# What is said of a run, and is no tool's merit.
NOT_JUDGED = ('others_pct',)
# The work that was done, for bounds().
HIDDEN = ('memory_bytes', 'data_bytes')
TITLES = {'limits': 'Limits of the machine', 'migrate': 'Migrations', 'repo': 'Repositories', 'clone': 'Clones',
          'dirtylog': 'Dirty tracking', 'growth': 'Growth'}
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
    name = metric.removesuffix('_' + metric.rpartition('_')[2]) if metric != unit else metric
    return f'{name.replace("_", " ")}, {"MB" if unit == "B" else unit}' if unit != '1' else metric.replace('_', ' ')


class Suite:
    """The rows of a SUITE.json, to look up."""

    def __init__(self, said):
        self.machine = said['machine']
        self.rows = {(row['part'], row['case'], row['tool'], row['metric']): row for row in said['results']}

    def values(self, position, **chosen):
        """What there is at a position of (part, case, tool, metric), in order, among the rows chosen."""
        keys = ('part', 'case', 'tool', 'metric')
        return list(dict.fromkeys(key[keys.index(position)] for key in self.rows
                                  if all(key[keys.index(name)] == value for name, value in chosen.items())))

    def median(self, *key):
        row = self.rows.get(key)
        return row['median'] if row else None


def best_peer(suite, part, case, metric):
    """The smallest (or largest) median of a tool that is not vmmig; None without one."""
    medians = [value for tool in suite.values('tool', part=part, case=case) if not tool.startswith('vmmig')
               if (value := suite.median(part, case, tool, metric)) is not None]
    return (max if metric in MORE_IS_BETTER else min)(medians) if medians else None


def loses(suite, part, case, tool, metric):
    best, own = best_peer(suite, part, case, metric), suite.median(part, case, tool, metric)
    if not tool.startswith('vmmig') or metric in NOT_JUDGED + HIDDEN or best is None or own is None:
        return False
    return own < best if metric in MORE_IS_BETTER else own > best * WORSE


def spread(row):
    runs = [run for run in row['runs'] if run is not None]
    if len(runs) < 2:
        return ''
    return f' ({number(min(runs), row["unit"])}–{number(max(runs), row["unit"])})'


def table(suite, part, case):
    tools = suite.values('tool', part=part, case=case)
    metrics = [metric for metric in suite.values('metric', part=part, case=case) if metric not in HIDDEN]
    units = {metric: next(row['unit'] for key, row in suite.rows.items() if key[0] == part and key[1] == case
                          and key[3] == metric) for metric in metrics}
    lines = [f'| {case} | ' + ' | '.join(column(metric, units[metric]) for metric in metrics) + ' |',
             '|---' * (len(metrics) + 1) + '|']
    for tool in tools:
        cells = []
        for metric in metrics:
            row = suite.rows.get((part, case, tool, metric))
            if row is None:
                cells.append('')
                continue
            text = number(row['median'], row['unit'])
            cells.append((f'**{text}**' if loses(suite, part, case, tool, metric) else text) + spread(row))
        lines.append(f'| {tool} | ' + ' | '.join(cells) + ' |')
    return lines


def losses(suite, part):
    """A line for each figure in which vmmig is behind a peer, with its ratio and the reason."""
    for case in suite.values('case', part=part):
        for tool in suite.values('tool', part=part, case=case):
            for metric in suite.values('metric', part=part, case=case):
                if loses(suite, part, case, tool, metric):
                    best = best_peer(suite, part, case, metric)
                    ratio = f'{suite.median(part, case, tool, metric) / best:.2f} of the best' if best else 'the best: 0'
                    yield f'- {case}, {tool}, {metric}: {ratio}. {explanation(part, case, tool, metric)}'


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


LINKS = {'100mbit': 100e6 / 8, '1gbit': 1e9 / 8, '10gbit': 10e9 / 8}


def bounds(suite, part, case, tool):
    """{what limits: the seconds that its share of the work takes at least, by the limits measured beside it}. Of the
    cores: the CPU time that the run used, were it spread over all of them without a gap."""
    def limit(name):
        return suite.median('limits', 'limits', 'machine', f'{name}_MBps') * 1e6

    def figure(metric):
        return suite.median(part, case, tool, metric) or 0

    cores = {'cores': figure('cpu_s') / suite.machine[part]['cpus']}
    if part == 'migrate':
        wire, link = figure('wire_bytes'), case.partition('/')[0]
        if link in LINKS:
            return {**cores, 'link': wire / LINKS[link]}
        return {**cores, 'loopback_tcp': wire / limit('loopback_tcp'), 'memcpy': figure('memory_bytes') / limit('memcpy')}
    if part == 'repo' and case in ('disk', 'memory', 'versions', 'siblings', 'export'):
        codec = 'lz4_decompress' if case == 'export' else 'sha256'
        found = {**cores, codec: figure('data_bytes') / limit(codec)}
        if tool == 'vmmig-rados' and case in ('disk', 'export'):
            cluster = 'cluster_write' if case == 'disk' else 'cluster_read'
            found[cluster] = figure('stored_bytes') / limit(cluster)
        return found
    return {}


def shares(suite, part):
    """For each of vmmig's figures: which limit binds it, and how near it is."""
    if 'limits' not in suite.machine:
        return []
    lines = ['| | | binds | share of it, % |', '|---|---|---|---|']
    for case in suite.values('case', part=part):
        for tool in [t for t in suite.values('tool', part=part, case=case) if t.startswith('vmmig')]:
            seconds = suite.median(part, case, tool, 'total_s') or (suite.median(part, case, tool, 'total_ms') or 0) / 1000
            if seconds and (found := bounds(suite, part, case, tool)):
                name = max(found, key=found.get)
                lines.append(f'| {case} | {tool} | {name} | {100 * found[name] / seconds:.0f} |')
    return lines if len(lines) > 2 else []


def describe(suite, part):
    m = suite.machine[part]
    versions = ', '.join(f'{name} {version}' for name, version in m['versions'].items())
    return (f'{m["cpus"]} cores of {m["cpu"]}, {m["memory_bytes"] / 2**30:.0f} GiB, Linux {m["kernel"]}; {versions}; '
            f'{m["date"]}, {m["took_s"]} s{", a quick run" if m["quick"] else ""}.')


def page(suite, plots):
    lines = ['# vmmig beside its peers', '', 'Made by `tests/bench/run`, of SUITE.json; no figure is typed by hand. '
             'Medians, with the smallest and largest of the runs. Where vmmig is behind the best of its peers its '
             'figure is **bold**.', '']
    for part, title in TITLES.items():
        if part not in suite.machine:
            continue
        lines += [f'## {title}', '', describe(suite, part), '']
        for name, text in plots.get(part, []):
            lines += [f'![{text}]({name}.svg)', '']
        for case in suite.values('case', part=part):
            lines += [*table(suite, part, case), '']
        if near := shares(suite, part):
            lines += ['How near the limit that binds:', '', *near, '']
        if behind := list(losses(suite, part)):
            lines += ['Where vmmig is behind:', '', *behind, '']
        if part == 'growth':
            lines += ['Faster than the work grows:', '', *(list(slopes(suite)) or ['- nothing']), '']
    return '\n'.join(lines)


# ---- plots

def gnuplot(folder, name, title, script, data):
    for terminal, ending in (('svg size 900,450 font "sans,11" background "white"', 'svg'),
                             ('pngcairo size 900,450 font "sans,10"', 'png')):
        text = f'set terminal {terminal}\nset output "{folder / name}.{ending}"\nset title "{title}"\n' \
               f'set key outside right\n$data << EOD\n{data}\nEOD\n{script}\n'
        subprocess.run(['gnuplot'], input=text, text=True, check=True, capture_output=True)


def bars(suite, folder, name, title, part, metric, scale, label):
    """Groups of bars: a group for a case, a bar for a tool."""
    tools = suite.values('tool', part=part, metric=metric)
    rows = []
    for case in suite.values('case', part=part, metric=metric):
        values = [suite.median(part, case, tool, metric) for tool in tools]
        rows.append(' '.join([f'"{case}"', *('?' if value is None else f'{value / scale:.6g}' for value in values)]))
    gnuplot(folder, name, title, f'set style data histograms\nset style fill solid\nset datafile missing "?"\n'
            f'set ylabel "{label}"\nset yrange [0:*]\nset xtics rotate by -30\nset grid y\nplot '
            + ', '.join(f'$data using {i + 2}:xtic(1) title "{tool}"' for i, tool in enumerate(tools)), '\n'.join(rows))


def curves(folder, name, title, xlabel, ylabel, lines, log=True):
    """lines: {name: [(x, y)]}"""
    blocks = '\n\n\n'.join('\n'.join(f'{x} {y}' for x, y in points) for points in lines.values())
    gnuplot(folder, name, title, ('set logscale xy\n' if log else '') + f'set xlabel "{xlabel}"\nset ylabel "{ylabel}"\n'
            'set grid\nplot ' + ', '.join(f'$data index {i} with linespoints title "{line}"'
                                          for i, line in enumerate(lines)), blocks)


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


def plot(suite, folder):
    """Makes all plots. Returns {part: [(name, title)]}."""
    made = {}

    def add(part, name, title, make, *arguments):
        if part in suite.machine:
            make(*arguments)
            made.setdefault(part, []).append((name, title))

    for metric, scale, label, title in (('total_ms', 1000, 's', 'Migration: total time'),
                                        ('pause_ms', 1, 'ms', 'Migration: the guest stands still'),
                                        ('wire_bytes', 1e6, 'MB', 'Migration: bytes on the wire')):
        name = f'migrate-{metric.rpartition("_")[0]}'
        add('migrate', name, title, bars, suite, folder, name, title, 'migrate', metric, scale, label)
    for metric, scale, label, title in (('total_s', 1, 's', 'Repository: time of each step'),
                                        ('stored_bytes', 1e6, 'MB', 'Repository: stored after each step')):
        name = f'repo-{metric.rpartition("_")[0]}'
        add('repo', name, title, bars, suite, folder, name, title, 'repo', metric, scale, label)
    add('clone', 'clone-start', 'Clones: from exec to a running guest', bars, suite, folder, 'clone-start',
        'Clones: from exec to a running guest', 'clone', 'start_ms', 1, 'ms')
    if 'dirtylog' in suite.machine:
        harvest = {}
        for case in suite.values('case', part='dirtylog'):
            for tool in suite.values('tool', part='dirtylog', case=case):
                for share in (1, 10, 100):
                    y = sum(suite.median('dirtylog', case, tool, f'{what}_{share}_ms') for what in ('harvest', 'clear'))
                    harvest.setdefault(f'{tool} {case}', []).append((share, y))
        add('dirtylog', 'dirtylog-harvest', 'Dirty tracking: reading and clearing the log', curves, folder,
            'dirtylog-harvest', 'Dirty tracking: reading and clearing the log', 'dirty pages, %', 'ms', harvest)
    for name, metrics, xlabel, ylabel in (('memory-filled', ['total_ms'], 'MiB of memory', 'ms'),
                                          ('memory-sparse', ['total_ms'], 'MiB of memory', 'ms'),
                                          ('images', ['import_ms', 'list_ms', 'collect_ms'], 'images', 'ms'),
                                          ('unique', ['make_s', 'share_s', 'collect_s'], 'GiB of unique data', 's')):
        if lines := growth_lines(suite, name, metrics):
            add('growth', f'growth-{name}', f'Growth: {name}', curves, folder, f'growth-{name}', f'Growth: {name}', xlabel,
                ylabel, lines)
    return made


def summary(suite):
    """For the README: each case of the migrations, and each step of the repository, vmmig's medians and the best peer's."""
    lines = []
    for part, metrics in (('migrate', ('total_ms', 'pause_ms', 'wire_bytes', 'cpu_s')), ('repo', ('total_s', 'stored_bytes'))):
        if part not in suite.machine:
            continue
        lines += [describe(suite, part), '', '| | | ' + ' | '.join(
            column(metric, next(row['unit'] for key, row in suite.rows.items() if key[3] == metric))
            for metric in metrics) + ' |', '|---' * (len(metrics) + 2) + '|']
        for case in suite.values('case', part=part):
            for tool in [t for t in suite.values('tool', part=part, case=case) if t.startswith('vmmig')]:
                cells = []
                for metric in metrics:
                    row, best = suite.rows.get((part, case, tool, metric)), best_peer(suite, part, case, metric)
                    own = number(row['median'], row['unit']) if row else '–'
                    own = f'**{own}**' if loses(suite, part, case, tool, metric) else own
                    cells.append(f'{own} : {number(best, row["unit"]) if row else "–"}')
                lines.append(f'| {case} | {tool} | ' + ' | '.join(cells) + ' |')
        lines.append('')
    return lines


def write_readme(suite, folder):
    path = ROOT / 'README.md'
    text = path.read_text(encoding='utf-8')
    if MARKS[0] not in text or folder.resolve() != ROOT / 'docs/bench':
        return
    lines = ['vmmig : the best of its peers, medians; **bold** where it is behind. All of it, and why: '
             '[docs/bench](docs/bench/README.md).', '', *summary(suite)]
    lines += [f'![{title}](docs/bench/{name}.svg)\n' for name, title in
              (('migrate-total', 'total time of migrations'), ('repo-stored', 'stored bytes'))]
    between = MARKS[0] + '\n' + '\n'.join(lines) + '\n' + MARKS[1]
    path.write_text(re.sub(re.escape(MARKS[0]) + '.*' + re.escape(MARKS[1]), lambda _: between, text, flags=re.S),
                    encoding='utf-8')


def write(path, folder):
    suite = Suite(load(path))
    plots = plot(suite, folder)
    (folder / 'README.md').write_text(page(suite, plots) + '\n', encoding='utf-8')
    write_readme(suite, folder)
