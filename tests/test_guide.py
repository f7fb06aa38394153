"The guide: each public callback has a section with all its parts; each example runs as pasted into a script"
import ast, re
from base64 import b64decode
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import fastai_callbacks_ext.all as ext
from fastai.callback import schedule
from fastai.optimizer import OptimWrapper
from fastai_callbacks_ext import test_utils
from fastai_callbacks_ext.test_utils import digits_learner
from fastcore.nbio import read_nb
from PIL import Image
from cases import every_case
from common import public_callbacks

guide = Path(__file__).parent.parent/'nbs'/'guide'
pages = {f.stem: read_nb(f).cells for f in sorted(guide.glob('*.ipynb'))}
parts = [f'**{o}**' for o in ('Use it when', 'Not for', 'What to set.', 'What it costs.', 'Beside others.',
                               'Evidence.')]

def sections(cells):
    "Cells of each section of the second level, by its heading"
    res,here = {},[]
    for c in cells:
        head = c.cell_type=='markdown' and re.match(r'## (.+)', c.source)
        if head: here = res.setdefault(head[1].strip('`'), [])
        here.append(c)
    return res

explained = {name: cells for page in pages.values() for name,cells in sections(page).items()}

def is_example(c): return c.cell_type=='code' and c.source[:2]!='#|' and not c.source.startswith('show_doc(')

@pytest.mark.parametrize('name', [cls.__name__ for cls in public_callbacks()])
def test_section(name):
    "What it does, when, how, what to set, cost, neighbours, evidence: in this order"
    assert name in explained
    cells = explained[name]
    at = [next((i,o.source.index(p)) for i,o in enumerate(cells) if o.cell_type=='markdown' and p in o.source)
          for p in parts]
    assert at==sorted(at)
    example = next(i for i,o in enumerate(cells) if is_example(o))
    table = next(i for i,o in enumerate(cells) if o.source==f'show_doc({name})')
    assert at[1][0]<example<at[2][0]<table<at[3][0]
    what = cells[0].source.split('\n', 1)[1].split('**')[0]
    assert 20<len(what)<300 and cells[0].source.count('\n')<12

def imports(cells): return next(c.source for c in cells if c.cell_type=='code' and 'all import *' in c.source)

def examples():
    "Those of the pages, each with the imports of its page before it"
    for page,cells in pages.items():
        for name,part in sections(cells).items():
            for n,c in enumerate(filter(is_example, part)):
                script = c.source if 'import *' in c.source else f'{imports(cells)}\n{c.source}'
                yield pytest.param(script, id=f'{page}-{name}-{n}')

all_images = test_utils.digits_dls
def few(bs=64, n=1024, **kwargs): return all_images(bs, min(n, 320), **kwargs)

@pytest.mark.parametrize('script', examples())
def test_example(script, tmp_path, monkeypatch):
    "With fastai's progress bar on; on few images, and on all where the pages are made, and in the soak"
    if not every_case: monkeypatch.setattr(test_utils, 'digits_dls', few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('matplotlib.pyplot.show', lambda: None)
    exec(compile(ast.parse(script), 'example', 'exec'), {'__name__':'__main__'})

choose = '\n'.join(c.source for c in pages['choose'])
fences = [o for o in re.findall(r'^```python\n(.*?)^```', choose, re.M|re.S) if 'import' not in o]

@pytest.mark.parametrize('lines', fences)
def test_lines_of_the_chooser(lines, tmp_path, monkeypatch):
    "With a learner at hand"
    monkeypatch.chdir(tmp_path)
    learn = digits_learner(n=100, path=tmp_path)
    exec(lines, {**vars(ext), 'learn':learn, 'partial':partial, 'OptimWrapper':OptimWrapper})
    assert 'fit' not in lines or learn.recorder.values

def test_chooser_has_all():
    assert not [o.__name__ for o in public_callbacks() if f'`{o.__name__}`' not in choose]

def figures(fn):
    "Figures of the notebook `fn`, as arrays of red, green, blue and opacity"
    pngs = [o.data['image/png'] for c in read_nb(fn).cells for o in c.get('outputs', [])
            if 'image/png' in o.get('data', {})]
    return [np.array(Image.open(BytesIO(b64decode(png))).convert('RGBA')) for png in pngs]

shown = [*guide.glob('*.ipynb'), guide.parent/'index.ipynb']
with_figures = [f for f in guide.parent.rglob('*.ipynb') if 'image/png' in f.read_text()]

@pytest.mark.parametrize('fn', sorted(with_figures), ids=lambda o: o.stem)
def test_figures_are_transparent(fn):
    for fig in figures(fn): assert fig[0,0,3]==0

def luminance(rgb):
    "Relative luminance of colors from 0 to 255, by WCAG 2"
    c = np.asarray(rgb)/255
    return np.where(c<=.04045, c/12.92, ((c+.055)/1.055)**2.4) @ [.2126,.7152,.0722]

@pytest.mark.parametrize('fn', sorted(shown), ids=lambda o: o.stem)
def test_figures_have_contrast(fn):
    "WCAG 2.1 asks for 3:1 in graphics; here all opaque colors that fill a thousandth of the figure have it"
    for fig in figures(fn):
        r,g,b = fig[fig[...,3]==255][:,:3].astype(int).T
        colors,counts = np.unique((r<<16)+(g<<8)+b, return_counts=True)
        used = colors[counts>fig[...,3].size/1000]
        light = luminance(np.stack([used>>16, used>>8&255, used&255], -1))
        for page in ((255,255,255), (19,20,22)):        # the backgrounds of light and dark pages
            low,high = np.minimum(light, luminance(page)),np.maximum(light, luminance(page))
            assert ((high+.05)/(low+.05)>=3).all()
