"Every notebook as a test: `cells` as written, `module` with its exported cells swapped for the exported module"
import atexit
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor
from nbdev.test import nb_test_cells

cfg = get_config(Path(__file__).parent)
notebooks = nbglob(cfg.nbs_path, as_path=True).sorted()
exported = {'export', 'exports', 'exporti'}

def module_of(fn):
    "Module that the notebook at `fn` exports to, if any"
    for c in NBProcessor(fn, rm_directives=False, process=True).nb.cells:
        if 'default_exp' in c.directives_: return f"{cfg.lib_path.name}.{c.directives_['default_exp'].strip()}"

def name(fn): return fn.relative_to(cfg.nbs_path).as_posix()
def param(f, mod, how): return pytest.param(f, mod, id=f'{name(f)}-{how}', marks=pytest.mark.xdist_group(name(f)))     # not at the same time: some write files
params = [param(f, None, 'cells') for f in notebooks] + [param(f, m, 'module') for f in notebooks if (m := module_of(f))]

@pytest.mark.notebook
@pytest.mark.parametrize('fn,mod', params)
def test_notebook(fn, mod, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    shell = CaptureShell(fn, profile=False)
    try:
        with working_directory(fn.parent): run(shell, fn, mod)
    finally:
        shell.close()
        atexit.unregister(shell.atexit_operations)      # else every shell costs 0.3 s at exit
        plt.close('all')

def run(shell, fn, mod):
    "Run the cells; the first exported one becomes the import of everything in `mod`, private names too"
    swap = f"import {mod} as _m; globals().update({{k:v for k,v in vars(_m).items() if k[:2]!='__'}})"
    for c in nb_test_cells(fn, []):
        src = c.source
        if mod and exported & c.directives_.keys(): src,swap = swap,''
        if not src: continue
        outs = shell.run(src, timeout=cfg.cell_timeout)
        if shell.exc:
            trace = ''.join(''.join(o.get('traceback', [])) for o in outs)[-3000:]
            pytest.fail(f'{fn.name} cell #{c.id}\n{c.source}\n\n{trace}', pytrace=False)
