"""Every notebook as a test, once: its exported cells are swapped for the exported module, which is what ships

That the cells are the module is seen by test_repo.py, which exports them anew."""
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
notebooks = nbglob(cfg.nbs_path, as_path=True).sorted().filter(lambda o: o.parent.name!='guide')
exported = {'export', 'exports', 'exporti'}

def module_of(fn):
    "Module that the notebook at `fn` exports to, if any"
    for c in NBProcessor(fn, rm_directives=False, process=True).nb.cells:
        if name := c.directives_.get('default_exp'): return f'{cfg.lib_path.name}.{name.strip()}'

def name(fn): return fn.relative_to(cfg.nbs_path).as_posix()

@pytest.mark.notebook
@pytest.mark.parametrize('fn', notebooks, ids=name)
def test_notebook(fn, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    shell = CaptureShell(fn, profile=False)
    shell.run_line_magic('config', 'InlineBackend.figure_formats = set()')     # nobody looks at its figures
    try:
        with working_directory(fn.parent): run(shell, fn, module_of(fn))
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
