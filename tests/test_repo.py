"Exported modules match the notebooks; notebooks are clean"
import inspect, shutil, subprocess, sys
from pathlib import Path

import pytest
from nbdev.config import get_config

cfg = get_config(Path(__file__).parent)
root,lib,nbs = cfg.config_path,cfg.lib_path,cfg.nbs_path

pytestmark = pytest.mark.xdist_group('repo')

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
    for cmd in ('nbdev-export', 'nbdev-clean'): subprocess.run([Path(sys.executable).parent/cmd], cwd=d, check=True, capture_output=True)
    return d

def same(a, b, hint):
    diff = sorted(k for k in a.keys()|b.keys() if a.get(k)!=b.get(k))
    assert not diff, f'{hint}: {diff}'

def test_modules_in_step(fresh): same(files(lib, '*.py'), files(fresh/lib.name, '*.py'), 'run `make notebooks`')
def test_notebooks_clean(fresh): same(files(nbs, '*.ipynb'), files(fresh/nbs.name, '*.ipynb'), 'run `make notebooks`')
def test_llms_in_step(fresh): same(files(nbs, 'llms.txt'), files(fresh/nbs.name, 'llms.txt'), 'run `make notebooks`')
def test_pyproject_stable(fresh): assert (root/'pyproject.toml').read_bytes()==(fresh/'pyproject.toml').read_bytes()
def test_no_machine_paths():
    for name,text in files(nbs, '*.ipynb').items(): assert str(root).encode() not in text and b'site-packages' not in text, name

def test_public_signatures_are_annotated():
    "`py.typed` promises it"
    import fastai_callbacks_ext.all as ext, fastai_callbacks_ext.test_utils as utils
    bare = []
    for o in [getattr(m, n) for m in (ext, utils) for n in m.__all__]:
        fs = [f for n,f in vars(o).items() if inspect.isfunction(f) and (n=='__init__' or n[0]!='_')] if isinstance(o, type) else [o]
        bare += [f'{f.__qualname__}({p.name})' for f in fs for p in inspect.signature(f).parameters.values()
                 if p.annotation is p.empty and p.name!='self' and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert not bare
