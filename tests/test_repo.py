"Exported modules match the notebooks; notebooks are clean; imports point down; lines fit the page"
import inspect, json, shutil, subprocess, sys
from pathlib import Path

import pytest
from nbdev.config import get_config

cfg = get_config(Path(__file__).parent)
sys.path.insert(0, str(cfg.config_path/'docs'))
import house
root,lib,nbs = cfg.config_path,cfg.lib_path,cfg.nbs_path

def files(d, pattern):
    shown = lambda p: not any(o.startswith('.') or o=='__pycache__' for o in p.relative_to(d).parts)
    return {p.relative_to(d).as_posix():p.read_bytes() for p in d.rglob(pattern) if shown(p)}

@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the project with its modules exported from scratch and its notebooks cleaned"
    d = tmp_path_factory.mktemp('fresh')
    shutil.copy(root/'pyproject.toml', d)
    shutil.copytree(nbs, d/nbs.name)
    (d/lib.name).mkdir()
    shutil.copy(lib/'__init__.py', d/lib.name)          # `__version__` lives here
    for cmd in ('nbdev-export', 'nbdev-clean'):
        subprocess.run([Path(sys.executable).parent/cmd], cwd=d, check=True, capture_output=True)
    return d

def same(a, b, hint):
    diff = sorted(k for k in a.keys()|b.keys() if a.get(k)!=b.get(k))
    assert not diff, f'{hint}: {diff}'

def in_step(fresh, d, pattern):
    same(files(d, pattern), files(fresh/d.name, pattern), 'run `make notebooks`')

def test_modules_in_step(fresh): in_step(fresh, lib, '*.py')
def test_notebooks_clean(fresh): in_step(fresh, nbs, '*.ipynb')
def test_llms_in_step(fresh): in_step(fresh, nbs, 'llms.txt')
def test_pyproject_stable(fresh):
    assert (root/'pyproject.toml').read_bytes()==(fresh/'pyproject.toml').read_bytes()
def test_no_machine_paths():
    for name,text in files(nbs, '*.ipynb').items():
        assert str(root).encode() not in text and b'site-packages' not in text, name

def test_a_cell_that_exports_does_nothing_else():
    "nbdev passes over it: a test in it would never run"
    cells = [(f.name, c) for f in nbs.rglob('*.ipynb') for c in json.loads(f.read_text())['cells']]
    code = [(name, ''.join(c['source'])) for name,c in cells if c['cell_type']=='code']
    alone = '#| hide\nimport nbdev; nbdev.nbdev_export()'
    assert not [name for name,src in code if 'nbdev_export()' in src and src.strip()!=alone]

def test_public_signatures_are_annotated():
    "`py.typed` promises it"
    import fastai_callbacks_ext.all as ext, fastai_callbacks_ext.test_utils as utils
    bare = []
    for o in filter(callable, [getattr(m, n) for m in (ext, utils) for n in m.__all__]):
        methods = [f for n,f in vars(o).items() if inspect.isfunction(f) and (n=='__init__' or n[0]!='_')]
        for f in methods if isinstance(o, type) else [o]:
            ps = [p for p in inspect.signature(f).parameters.values()
                  if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            bare += [f'{f.__qualname__}({p.name})' for p in ps if p.annotation is p.empty and p.name!='self']
    assert not bare

# --- the house ----------------------------------------------------------------------------------
# none imports a later one
ORDER = 'base.core','base.files','base.model','base.step','base.identity','base.state'
MANY = 'all','monitors','upgrades'         # may import purposes

def test_imports_point_down():
    "`base` imports nothing above it, and is in order itself; no purpose imports another one"
    found = house.imports()
    assert found['loop']==['base.calls','base.core','base.lent'] and 'tracing' in found['all']
    assert 'base.model' in found['base.step']
    def may(mod, other):
        if mod in ORDER and other in ORDER: return ORDER.index(other)<ORDER.index(mod)
        return mod in MANY or (other.startswith('base.') and mod!='test_utils')
    assert not [f'{mod} imports {o}' for mod,others in found.items() for o in others if not may(mod, o)]
    assert sum(map(len, house.floors(found)))==len(found)       # without circles

def test_the_map_names_every_module():
    text = (nbs/'base'/'house.ipynb').read_text()
    pages = [f.name for d in (nbs, nbs/'base') for f in d.glob('*.ipynb')]
    others = 'house.ipynb','index.ipynb','all.ipynb'
    assert not [o for o in pages if o not in others and f'{o})' not in text]

def lines(f):
    "The lines of a notebook or a module, each with where it is"
    if f.suffix=='.py': return enumerate(f.read_text().splitlines(), 1)
    return [(c['id'], l) for c in json.loads(f.read_text())['cells']
            for l in ''.join(c['source']).splitlines()]

def test_lines_fit_the_page():
    "110 characters; rows of a table and addresses cannot be broken"
    files = list(nbs.rglob('*.ipynb'))
    files += [f for d in ('tests','benchmarks','docs') for f in (root/d).glob('*.py')]
    fits = lambda l: len(l)<=110 or l.lstrip().startswith('|') or '](http' in l
    long = [f'{f.relative_to(root)}, {where}: {l[:60]}...' for f in files
            for where,l in lines(f) if not fits(l)]
    assert not long, '\n'.join(long)
