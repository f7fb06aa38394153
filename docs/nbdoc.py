"nbdev notebooks -> MyST pages, Markdown pages, README.md, by nbdev's processors; no notebook is executed"
import os, re, shutil, sys
from base64 import b64decode
from functools import cache, partial
from importlib import import_module
from inspect import Parameter
from io import BufferedWriter
from pathlib import Path
from types import UnionType
from typing import get_args

import pandas as pd
import torch
from fastai.callback.core import event
from fastcore.basics import exec_local
from fastcore.docments import ShowDocRenderer, docments, empty
from fastcore.foundation import L
from fastcore.nbio import mk_cell, read_nb, write_nb
from fastcore.xtras import Config
from matplotlib.axes import Axes
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup, nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor, Processor
from nbdev import processors
from nbdev.processors import *

root = Path(__file__).resolve().parent.parent
os.chdir(root)                      # where nbdev looks for its settings
sys.path.insert(0, str(root))
processors.get_config = cache(get_config)      # it reads the file again for each cell
cfg,site = get_config(),Config.find('settings.ini')
doc_url = cfg.doc_url and cfg.doc_url.rstrip('/')+'/'
# {module: {symbol: (page#anchor, file)}}
modules = exec_local((cfg.lib_path/'_modidx.py').read_text(), 'd')['syms']

lookup = NbdevLookup()
for mod,syms in modules.items():
    for full,(page,py) in syms.items():
        name = full.removeprefix(mod+'.')
        for k in (full,name):
            public = name.partition('.')[0] in import_module(mod).__all__
            if public: lookup.syms[k] = f'own:{page}',py,f'own:source/{mod}.html'
            else: lookup.syms.pop(k, None)

# --- show_doc -----------------------------------------------------------------------------------
def _types(anno):
    "The types that an annotation consists of"
    if anno is empty or anno is type(None): return ()
    return get_args(anno) if isinstance(anno, UnionType) else (anno,)

def _name(t): return 'None' if t is type(None) else getattr(t, '__name__', None) or str(t)
def _default(o): return '' if o is empty else getattr(o, '__name__', None) or repr(o)
def _code(s): return f'`` {s} ``' if s else ''        # single backticks become links

docs_of = {'python':'https://docs.python.org/3/library/', 'torch':'https://docs.pytorch.org/docs/stable/',
           'fastcore':'https://fastcore.fast.ai/', 'matplotlib':'https://matplotlib.org/stable/api/_as_gen/',
           'pandas':'https://pandas.pydata.org/docs/reference/api/'}
elsewhere = {torch.Tensor: docs_of['torch']+'tensors.html',
             torch.device: docs_of['torch']+'tensor_attributes.html#torch.device',
             torch.nn.Module: docs_of['torch']+'generated/torch.nn.Module.html',
             torch.nn.Parameter: docs_of['torch']+'generated/torch.nn.parameter.Parameter.html',
             Path: docs_of['python']+'pathlib.html#pathlib.Path',
             BufferedWriter: docs_of['python']+'io.html#io.BufferedWriter',
             pd.DataFrame: docs_of['pandas']+'pandas.DataFrame.html',
             L: docs_of['fastcore']+'foundation.html#l',
             Axes: docs_of['matplotlib']+'matplotlib.axes.Axes.html'}

def _linked(t):
    "The type `t` as code, with a link to the pages that explain it: of Python, PyTorch, fastai, or these"
    name,mod = _name(t),getattr(t, '__module__', '')
    url = elsewhere.get(t)
    if mod in ('collections.abc','datetime'): url = f"{docs_of['python']}{mod}.html#{mod}.{name}"
    return f'[{_code(name)}]({url})' if url else f'`{name}`'

def _row(name, p):
    "Name, types, default and description of a parameter"
    star = {Parameter.VAR_POSITIONAL:'*', Parameter.VAR_KEYWORD:'**'}.get(p.get('kind'), '')
    return star+name, _types(p['anno']), _default(p.get('default', empty)), p['docment'] or ''

def _signature(start, params, ret):
    union = lambda types: ' | '.join(map(_name, types))
    args = [n + (f':{union(t)}' if t else '') + (f'={d}' if d else '') for n,t,d,_ in params]
    end = f' -> {union(ret)}' if ret else ''
    line = f"{start}({', '.join(args)}){end}"
    return line if len(line)<=80 else f'{start}(\n    ' + ',\n    '.join(args) + f'\n){end}'

def _table(rows):
    "Markdown table of `rows`, without empty columns; none without rows"
    if not rows: return ''
    cols = [c for c in zip(('Parameter','Type','Default','Description'), ('---',)*4, *rows) if any(c[2:])]
    cell = lambda o: o.replace('|', r'\|').replace('\n', ' ')
    return '\n'.join('| ' + ' | '.join(map(cell, r)) + ' |' for r in zip(*cols))

def show_doc(sym, in_guide=False):
    "Name and full name of `sym`; its source link, signature, summary and parameters; in the guide less"
    r = ShowDocRenderer(sym)
    d = docments(r.sym, full=True, args_kwargs=True)
    hidden = {'self','return',*vars(event)}     # every fastai callback takes the events
    params = [_row(k, p) for k,p in d.items() if k not in hidden]
    ret = _row('', d['return']) if 'return' in d else ('',)*4
    linked = lambda types: ' | '.join(map(_linked, types))
    rows = [(_code(n), linked(t), _code(v), doc) for n,t,v,doc in params]
    source = f'[[source]]({lookup.code(r.nm)})'
    if in_guide: return r.nm, r.fn, f'{_table(rows)}\n\n{source}'
    if ret[3]: rows.append(('**returns**', linked(ret[1]), '', ret[3]))
    start = 'class ' if isinstance(r.sym, type) else 'property ' if isinstance(sym, property) else ''
    signature = f'```python\n{_signature(start+r.nm, params, ret[1])}\n```'
    table = [_table(rows)]*any(o[3] for o in rows)
    return r.nm, r.fn, '\n\n'.join([source, signature, r.docs, *table])

def _only_fastai_calls(name): return '.' in name and name.rpartition('.')[2] in vars(event)

class render_show_docs(Processor):
    "Turn `show_doc` cells into Markdown, each under a heading unless the text has just given it one"
    def begin(self):
        self.ns = {name:getattr(m, name) for m in map(import_module, modules) for name in m.__all__}
        self.ns['show_doc'] = partial(show_doc, in_guide=self.nb.in_guide_)
        # full names by name; level of the last heading, and of the symbols below it
        self.nb.symbols_,self.level,self.here = {},1,{}

    def cell(self, cell):
        if cell.cell_type=='markdown': self._headings(cell.source)
        elif cell.source.startswith('show_doc(_'):      # of a private class
            cell.clear()
            cell.update(mk_cell('', 'markdown'))
        elif cell.source.startswith('show_doc('):
            name,full,md = eval(cell.source, self.ns)
            if _only_fastai_calls(name): md = ''
            elif name not in self.here:
                self.here[name] = self.here.get(name.rpartition('.')[0], self.level) + 1
                md = f"{'#'*self.here[name]} " + name.replace('_', r'\_') + f'\n\n{md}'
            if md: self.nb.symbols_[name] = full
            cell.clear()
            cell.update(mk_cell(md, 'markdown'))

    def _headings(self, s):
        s = re.sub(r'^```.*?^```', '', s, flags=re.M|re.S)
        for h,text in re.findall(r'^(#+) +(.*?) *$', s, re.M):
            self.level,self.here = len(h),{text.strip('`'):len(h)}

procs = [FrontmatterProc, add_show_docs, strip_ansi, hide_line, filter_stream_, render_show_docs, rm_export,
         clean_magics, hide_, add_links,
         mv_exports]

# --- Pages --------------------------------------------------------------------------------------
# Quarto's options in myst-nb; the package's own code is folded
tags = {('echo','false'):'remove-input', ('output','false'):'remove-output', ('code-fold',''):'hide-input',
        ('exports',''):'hide-input'}

def in_guide(fn): return cfg.nbs_path/'guide' in Path(fn).parents

def sections(fn):
    "The public names that the notebook `fn` has a section of its own for"
    text = '\n'.join(c.source for c in read_nb(fn).cells if c.cell_type=='markdown')
    return [o for o in re.findall(r'^## `?(\w+)`?$', text, re.M) if o in lookup.syms]

class Page:
    "A processed notebook"
    def __init__(self, fn):
        self.nb = read_nb(fn)
        self.nb.in_guide_ = in_guide(fn)
        NBProcessor(nb=self.nb, procs=procs).process()
        fm = self.nb.frontmatter_
        self.rel = Path(fn).resolve().relative_to(cfg.nbs_path)
        self.html,self.symbols = nbpath2html(self.rel).as_posix(),self.nb.symbols_
        title = mk_cell(f"# {fm['title']}\n\n{lookup.linkify(fm.get('description', ''))}", 'markdown')
        shown = lambda c: c.cell_type!='raw' and (c.source or c.get('outputs'))
        self.cells = [title, *filter(shown, self.nb.cells)]
        for c in self.cells:
            if c.cell_type=='code':
                c.metadata = dict(tags=[tags[o] for o in c.directives_.items() if o in tags])
            for o in c.get('outputs', []):
                # a progress bar overwrites itself
                if o.output_type=='stream': o.text = re.sub(r'.*\r', '', o.text)

pages,guided = {},{}        # pages by address; names that are explained in the guide, by its pages
def load():
    "Fill `pages` and `guided`"
    fns = nbglob(cfg.nbs_path).sorted()
    for fn in filter(in_guide, fns):
        html = nbpath2html(Path(fn).relative_to(cfg.nbs_path)).as_posix()
        guided[html] = sections(fn)
        for name in guided[html]:
            lookup.syms[name] = f'own:{html}#{name.lower()}',*lookup.syms[name][1:]
    for p in map(Page, fns): pages[p.html] = p

# --- Links --------------------------------------------------------------------------------------
files = set()                       # of the repository, that pages link to

def target(page, url):
    "Address within the site and anchor that `url` in `page` leads to, None for the rest of the world"
    path,_,anchor = url.partition('#')
    if path.startswith('own:'):
        path = path.removeprefix('own:')
        while path in pages and anchor and anchor not in map(str.lower, pages[path].symbols):
            anchor = anchor.rpartition('.')[0]
        return path,anchor
    f = (cfg.nbs_path/page.rel.parent/path).resolve()
    if ':' in path or not f.is_file(): return
    if f.suffix=='.ipynb' and f.is_relative_to(cfg.nbs_path):
        return nbpath2html(f.relative_to(cfg.nbs_path)).as_posix(),anchor
    files.add(f.relative_to(root))
    return f'files/{f.relative_to(root).as_posix()}',anchor

def relink(page, s, link):
    "`s` of `page`, with `link(page, path, anchor)` as the address of what is on the site"
    return re.sub(r'\]\(([^)\s]+)\)', lambda m: ']'+link(page, *t) if (t := target(page, m[1])) else m[0], s)

def up(page): return '../'*page.html.count('/')
def _url(path, anchor): return f'{path}#{anchor}' if anchor else path

def site_link(page, path, anchor):
    if path not in pages: return f'({up(page)}{_url(path, anchor)}){{.external}}'
    url = _url(path.replace('.html', '.ipynb'), anchor.replace('.', ''))       # MyST's anchors have no dots
    return f'({up(page)}{url})'

def md_link(start=''):
    url = lambda path, anchor: f'{path}.md' if path in pages else _url(path, anchor)
    return lambda page, path, anchor: f'({doc_url or start}{url(path, anchor)})'

def repo_link(page, path, anchor):
    if doc_url and path in pages: return f'({doc_url}{_url(path, anchor)})'
    file = path.removeprefix('files/')
    if path in pages: file = f'{cfg.nbs_path.name}/{pages[path].rel.as_posix()}'
    return f"({f'{cfg.git_url}/blob/{cfg.branch}/' if cfg.git_url else ''}{file})"

# --- What is written ----------------------------------------------------------------------------
def _toctree(line):
    "A line `caption: page ...` of `nav` as a part of the sidebar"
    caption,_,names = line.partition(':')
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption.strip()}', '', *names.split(), '```'])

def stage(dst):
    "Write the pages as notebooks for Sphinx"
    nav = '\n\n'.join(map(_toctree, site.nav.strip().splitlines()))
    pages['index.html'].cells.append(mk_cell(nav, 'markdown'))
    for p in pages.values():
        for c in p.cells:
            if c.cell_type=='markdown': c.source = relink(p, c.source, site_link)
            for o in c.get('outputs', []):
                md = o.get('data', {}).get('text/markdown')
                if md: o.data['text/markdown'] = relink(p, md, site_link)
        f = (dst/p.html).with_suffix('.ipynb')
        f.parent.mkdir(parents=True, exist_ok=True)
        p.nb.cells = p.cells
        write_nb(p.nb, f)
    shutil.copy(root/'CHANGELOG.md', dst/'changelog.md')

def _output_md(page, o, link, img):
    data = o.get('data', {})
    if 'image/png' in data: return img(b64decode(data['image/png']))
    if 'text/markdown' in data: return relink(page, data['text/markdown'], link)
    text = o.text if o.output_type=='stream' else data.get('text/plain', '')
    hidden = 'text/html' in data and text.startswith('<')       # `<IPython.core.display.HTML object>`
    return f'```text\n{text.rstrip()}\n```' if text.strip() and not hidden else ''

def to_md(page, link, img=lambda png: ''):
    "`page` (not yet staged) as Markdown; `img` writes a figure"
    res = []
    for c in page.cells:
        if c.cell_type=='markdown': res.append(relink(page, c.source, link)); continue
        if c.source and 'remove-input' not in c.metadata['tags']: res.append(f'```python\n{c.source}\n```')
        if 'remove-output' in c.metadata['tags']: continue
        res += [_output_md(page, o, link, img) for o in c.outputs]
    return '\n\n'.join(s.strip() for s in res if s.strip())+'\n'

def readme():
    "Text of README.md, and its images as `{path: bytes}`"
    imgs = {}
    def img(png):
        path = f'docs/_static/readme-{len(imgs)+1}.png'
        imgs[path] = png
        return f"![]({f'{cfg.git_url}/raw/{cfg.branch}/' if cfg.git_url else ''}{path})"
    note = '<!-- Written from nbs/index.ipynb by `python docs/build.py --readme` -->'
    return f"{note}\n\n{to_md(pages['index.html'], repo_link, img)}", imgs
