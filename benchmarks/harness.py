"""Measurements side by side: rounds in which every case has its turn, medians, ratios to a baseline

A benchmark calls `options`, `measure` for each of its tables, and `report`, which prints them and writes
results/NAME.json. A page of the docs loads that file and shows it with `table`, `plot` and `about`.
"""
import argparse, atexit, gc, io, json, os, platform, shutil, sys, tempfile, time
from base64 import b64encode
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

SCALE = {'ms':1e3, 'µs':1e6, 'ns':1e9}

def options(doc, rounds=9, device=False):
    "The parser with what every benchmark has; threads are set to 1. `device`: it can run on a GPU too"
    torch.set_num_threads(1)
    _own_temporary_folder()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=rounds,
                        help='times that each case is measured (default: %(default)s)')
    devices = dict(choices=('cpu','cuda'), default='cpu', help='(default: %(default)s)')
    if device: parser.add_argument('--device', **devices)
    return parser

def _own_temporary_folder():
    "Removed at the end, with what processes that are started here leave: checkpoints of whole models"
    folder = tempfile.mkdtemp(prefix='benchmark-')
    os.environ['TMPDIR'] = tempfile.tempdir = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

def sync():
    "Wait for the GPU, if one is used: call it before the clock is read, around many batches"
    if torch.cuda.is_initialized(): torch.cuda.synchronize()

def on_device(name, device):
    "Name of the results: those of a GPU lie beside those of the CPU"
    return name if device=='cpu' else f'{name}-{device}'

def measure(cases, rounds, unit='ms a batch', baseline=None):
    """Quartiles of each of `cases`, functions that return seconds, or what else `unit` says

    `baseline` is the first case if not named."""
    values = {k:[] for k in cases}
    for i in range(rounds+1):
        for k,case in cases.items():
            if sys.stderr.isatty():
                print(f'\r\033[Kround {i} of {rounds}: {k}', end='\r', file=sys.stderr, flush=True)
            gc.collect()
            values[k].append(case() * SCALE.get(unit.split()[0], 1))
    # round 0 is the warm-up
    quartiles = {k:np.quantile(v[1:], (.25,.5,.75)).round(4).tolist() for k,v in values.items()}
    rows = {k:dict(zip(('low','median','high'), q)) for k,q in quartiles.items()}
    return dict(unit=unit, baseline=baseline or next(iter(cases)), rows=rows)

def apart():
    "What calls functions in a process of its own, for cases whose imports would slow the others down"
    pool = ProcessPoolExecutor(1, get_context('spawn'), torch.set_num_threads, (1,))
    return lambda f,*args: pool.submit(f, *args).result()

def seeds_options(doc):
    "The parser of what trains with several seeds"
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5, help='(default: %(default)s)')
    parser.add_argument('--processes', type=int, default=2, help='(default: %(default)s)')
    return parser

def noted(file):
    "What was found so far: lists of a job and its result, in a file beside `file`"
    notes = file.with_suffix('.jsonl')
    return [json.loads(o) for o in notes.read_text('utf-8').splitlines()] if notes.exists() else []

def run_noted(find, jobs, file, processes):
    "Do those of the `jobs` (tuples of arguments of `find`) that were not done, and note each result"
    done = {tuple(o[:-1]) for o in noted(file)}
    with ProcessPoolExecutor(processes, get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(find, *job): job for job in jobs if job not in done}
        for future in as_completed(futures):
            line = json.dumps([*futures[future], future.result()], ensure_ascii=False)
            with file.with_suffix('.jsonl').open('a', encoding='utf-8') as f: f.write(line+'\n')
            print(line, flush=True)

def ratio(results, title, row, baseline=None):
    "Median of `row` over that of `baseline`, the table's own if not named"
    t = results['tables'][title]
    return t['rows'][row]['median'] / t['rows'][baseline or t['baseline']]['median']

def report(name, tables, rounds, device='cpu', packages=(), **facts):
    """Print the `tables` (title: what `measure` returns)

    With what they were measured on, they are written to results/`name`.json."""
    results = write(name, tables, rounds, device, packages, **facts)
    print(about(results))
    for title in tables: print(f'\n{title}\n\n{table(results, title)}')
    return results

def write(name, tables, rounds, device='cpu', packages=(), **facts):
    "Write the `tables`, with what they were measured on, to results/`name`.json"
    versions = {p:version(p) for p in ('torch', 'fastai', *packages) if find_spec(p)}
    machine = torch.cuda.get_device_name() if device=='cuda' else f'{platform.machine()} CPU'
    results = dict(date=time.strftime('%Y-%m-%d'), versions={'Python':platform.python_version()} | versions,
                   machine=machine, threads=torch.get_num_threads(), rounds=rounds, **facts, tables=tables)
    file = Path(__file__).parent/'results'/f'{name}.json'
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False)+'\n', 'utf-8')
    return results

def facts(results):
    "When and on what it was measured"
    versions,threads = ', '.join(f'{k} {v}' for k,v in results['versions'].items()),results['threads']
    return f"{results['date']}, {versions}, {results['machine']}, {threads} thread{'s'*(threads>1)}"

def about(results):
    "When, on what and how it was measured"
    return f"{facts(results)}; medians and quartiles of {results['rounds']} interleaved rounds"

def num(v): return f'{v:.2g}' if abs(v)<0.1 else f'{v:.2f}' if abs(v)<100 else f'{v:,.0f}'

def table(results, title):
    "A table of `results` as Markdown"
    t = results['tables'][title]
    rows = [(k, num(r['median']), f"{num(r['low'])} to {num(r['high'])}", num(ratio(results, title, k)))
            for k,r in t['rows'].items()]
    return _markdown(('', t['unit'], 'quartiles', 'ratio'), rows)

def seeds_table(t, names):
    """Mean and standard deviation over seeds of the rows `names` of `t`, the first of all rows on top

    And in how many seeds each was better than that one."""
    base,sign = next(iter(t['rows'].values())),1 if t['larger_is_better'] else -1
    digits = 3 if t['larger_is_better'] else 2
    better = lambda values: sum(sign*(v-b)>0 for v,b in zip(values, base))
    rows = [(k, f'{np.mean(v):.{digits}f}', f'{np.std(v, ddof=1):.{digits}f}',
             '' if v is base else f'{better(v)} of {len(v)}')
            for k,v in t['rows'].items() if v is base or k in names]
    return _markdown(('', t['unit'], 'standard deviation', 'better in'), rows)

def gain(unit, value, plain):
    "How much better `value` is: in percent of a perplexity, in points of what is in percent"
    return 100*(plain-value)/plain if unit=='perplexity' else 100*(value-plain)

def by_luck(results, title, task):
    "How large the mean gain is that other weights alone make, in 19 of 20 cases"
    unit,runs = results['units'][task],np.array(results['plain'][title][task])[...,1]
    gains = np.array([[gain(unit, v, o.mean()) for v in o] for o in runs])
    return 2.2*np.sqrt(gains.var(1, ddof=1).mean() * 2/len(runs))

def gains_table(results, block):
    """A row for each technique, a column for each task: mean gain, standard deviation, how many seeds gained

    A gain or loss in bold is more than `by_luck`."""
    plain,units = results['plain'][block['plain']],results['units']
    luck = {task: by_luck(results, block['plain'], task) for task in units}
    def cell(task, values):
        if isinstance(values, str): return f'- {values}'
        gains = [gain(units[task], v, o[0][1]) for (_,v),o in zip(values, plain[task])]
        mean,wins = np.mean(gains),sum(o>0 for o in gains)
        mark = '**'*bool(abs(mean)>luck[task])
        return f'{mark}{mean:+.1f}{mark} ± {np.std(gains, ddof=1):.1f}, {wins}/{len(gains)}'
    def whole(task):
        v = np.array(plain[task])[:,0,1] * (1 if units[task]=='perplexity' else 100)
        return f'{v.mean():.1f} ± {v.std(ddof=1):.1f}'
    rows = [('unit', *units.values()), ('plain fit', *map(whole, units)),
            ('seeds alone', *(f'± {o:.1f}' for o in luck.values()))]
    rows += [(f'`{k}`' if k[0]!='(' else k, *(cell(task, v) for task,v in row.items()))
             for k,row in block['rows'].items()]
    return _markdown(('', *units), rows)

def _markdown(head, rows):
    w = [max(map(len, column)) for column in zip(head, *rows)]
    def line(first, *others): return [first.ljust(w[0]), *(o.rjust(n) for o,n in zip(others, w[1:]))]
    lines = ['| '+' | '.join(line(*row))+' |' for row in (head, *rows)]
    rule = '|'+'|'.join(['-'*(w[0]+2), *('-'*(n+1)+':' for n in w[1:])])+'|'
    return '\n'.join([lines[0], rule, *lines[1:]])

def plot(results, titles, fig=None, mark=None):
    "Bars of the ratios, with quartiles, a panel for each of `titles`; rows with `mark` in them in colour"
    from matplotlib import pyplot as plt
    sizes = [len(results['tables'][o]['rows']) for o in titles]
    fig = fig or plt.figure(figsize=(8, 0.9*len(titles)+0.3*sum(sizes)), layout='constrained')
    axs = fig.subplots(len(titles), 1, squeeze=False, height_ratios=sizes)[:,0]
    for ax,title in zip(axs, titles): _bars(ax, title, results['tables'][title], mark)
    return fig

def _bars(ax, title, t, mark):
    names,base = list(t['rows']),t['rows'][t['baseline']]['median']
    low,mid,high = (np.array([r[k]/base for r in t['rows'].values()]) for k in ('low','median','high'))
    colors = ['C0' if mark and mark in k else '.55' for k in names]
    ax.barh(names, mid, color=colors, xerr=(mid-low, high-mid), ecolor='.48')
    ax.axvline(1, c='.48', lw=0.8, ls=':')
    for y,(m,h) in enumerate(zip(mid, high)):
        ax.annotate(num(m), (h,y), (4,0), textcoords='offset points', va='center')
    if mid.max() > 30*mid.min() > 0: ax.set_xscale('log')
    ax.set_title(title, loc='left', fontsize='medium')
    ax.set_xlabel(f"ratio to {t['baseline']} ({num(base)} {t['unit']})")
    ax.margins(x=0.1, y=0.02)
    ax.invert_yaxis()
    ax.tick_params(axis='y', length=0)
    ax.spines[['top','right','left']].set_visible(False)

def few_colours(n=64):
    "Store the figures of this notebook with `n` colours: a third of the bytes, and they look the same"
    from IPython import get_ipython
    from IPython.core.pylabtools import retina_figure
    from matplotlib.figure import Figure
    from PIL import Image
    def png(fig):
        data,size = retina_figure(fig)
        image,out = Image.open(io.BytesIO(data)).convert('RGBA'),io.BytesIO()
        image.quantize(n, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(out, 'png')
        return b64encode(out.getvalue()).decode(),size
    get_ipython().display_formatter.formatters['image/png'].for_type(Figure, png)
