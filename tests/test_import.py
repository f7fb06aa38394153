"Importing the package changes nothing in fastai"
import importlib, json, subprocess, sys

import pytest, torch
from fastai.learner import load_learner
from fastai.torch_core import to_cpu
import fastai_callbacks_ext.all as ext
from common import NEEDS, Exports, export, fit, learner, make, public_callbacks, quiet

code = '''
import inspect, json, sys, warnings
warnings.filterwarnings('ignore')
from fastai.vision.all import *
from fastai.text.all import *
from fastai.tabular.all import *
import fastai.callback.all, signal
before_defaults = list(defaults.callbacks)

def state():
    torchs = 'torch.nn.modules.module','torch.optim.optimizer'
    looked_at = lambda k: k.split('.')[0] in ('fastai','fastcore') or k in torchs
    mods = {k:m for k,m in sys.modules.items() if looked_at(k)}
    names = {f'{k}.{n}':id(v) for k,m in mods.items() for n,v in list(vars(m).items()) if n[:2]!='__'}
    classes = {v for m in mods.values() for v in list(vars(m).values()) if inspect.isclass(v)}
    but = '__doc__','__abstractmethods__','_abc_impl'
    attrs = {f'{c.__module__}.{c.__qualname__}.{n}':id(v) for c in classes for n,v in list(vars(c).items())
             if n not in but}
    return set(mods),names,attrs
mods,names,attrs = state()
handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}
from fastai_callbacks_ext.all import *
after_mods,after_names,after_attrs = state()
is_new = lambda k: any(k.startswith(m+'.') for m in after_mods-mods)
new = {k for k in after_names if k.split('.')[0] in ('fastai','fastcore') and is_new(k)}
changed = [k for k in names if names[k]!=after_names.get(k)]
changed += [k for k in after_names if k not in names and k not in new]
changed += [k for k in attrs if attrs[k]!=after_attrs.get(k)]
changed += [k for k in after_attrs if k not in attrs and not any(m in k for m in after_mods-mods)]
assert {s: signal.getsignal(s) for s in signal.valid_signals()}==handlers
assert list(defaults.callbacks)==before_defaults
print(json.dumps([len(attrs), changed]))
'''

def test_import_changes_nothing():
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert res.returncode==0, res.stderr[-2000:]
    n,changed = json.loads(res.stdout.splitlines()[-1])
    assert n>3000 and changed==[]

def test_names_upgrade_fastai():
    "Imported after fastai, the names that both have are ours"
    ns = {}
    exec('from fastai.text.all import *\nfrom fastai_callbacks_ext.all import *', ns)
    for o in SAME_JOB: assert ns[o].__module__.startswith('fastai_callbacks_ext'), o

# Names that fastai has too, for the same job
SAME_JOB = {'ModelResetter','RNNCallback','RNNRegularizer','rnn_cbs','TerminateOnNaNCallback',
            'EarlyStoppingCallback','MixUp','CutMix','GradientAccumulation','GradientClip','ActivationStats',
            'ReduceLROnPlateau','BnFreeze'}

modules = ['fastai.vision.all','fastai.text.all','fastai.tabular.all','fastai.collab','fastai.callback.all',
           'fastai.optimizer','fastai.distributed','fastcore.all','torch','torch.nn','torch.optim']
@pytest.mark.parametrize('module', modules)
def test_no_name_means_something_else(module):
    "`import *` after others' replaces names of the same job only"
    theirs = vars(importlib.import_module(module))
    clashes = {n for n in ext.__all__ if n in theirs and theirs[n] is not getattr(ext, n)}
    assert clashes<=SAME_JOB

missing = """
import sys, warnings
warnings.filterwarnings('ignore')
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0]=='fastai_callbacks_ext': raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Nowhere())
import torch
from fastai.learner import load_learner
for folder in sys.argv[1:]:
    learn = load_learner(f'{folder}/export.pkl')
    *batch,want = torch.load(f'{folder}/want.pt', weights_only=False)
    got = learn.get_preds(dl=[batch])[0]
    assert torch.equal(got, want), folder
    print(folder, [type(cb).__name__ for cb in learn.cbs])
assert not any(o.startswith('fastai_callbacks_ext') for o in sys.modules)
"""

def test_export_loads_without_the_package(tmp_path, monkeypatch):
    "With every public callback, in mid-fit too; an AWD-LSTM still gets its output taken apart"
    monkeypatch.chdir(tmp_path)
    # the optimizer that `ScheduleFree` has here is of this package
    kinds = [o for o in public_callbacks() if o is not ext.ScheduleFree]
    groups = [[cls] for cls in kinds if cls in NEEDS or cls in (ext.Checkpoint, ext.GradientAccumulation)]
    groups += [[cls] for cls in kinds if [cls] not in groups]
    folders = []
    for classes in groups:
        learn = fit(learner(*classes))
        learn.path = tmp_path/classes[0].__name__
        learn.path.mkdir()
        batch = to_cpu(learn.dls.valid.one_batch())
        learn.dls.cpu()
        with quiet(learn): want = learn.get_preds(dl=[batch])[0]
        torch.save((*batch, want), learn.path/'want.pt')
        export(learn)
        folders.append(learn.path)
        if classes[0] in (ext.RNNCallback, ext.Checkpoint):      # with the package, they are what they were
            loaded = load_learner(learn.path/'export.pkl')
            assert [type(cb) for cb in loaded.cbs]==[type(cb) for cb in learn.cbs]
    fit(learner(cbs=[Exports(), *map(make, groups[-1])], path=tmp_path))
    folders.append(tmp_path/'mid_fit')
    folders[-1].mkdir()
    loaded = load_learner((tmp_path/'epoch.pkl').rename(folders[-1]/'export.pkl'))
    with quiet(loaded): want = loaded.get_preds(dl=[batch])[0]
    torch.save((*batch, want), folders[-1]/'want.pt')
    command = [sys.executable, '-c', missing, *folders]
    res = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode==0, res.stderr[-2000:]
    assert 'RNNCallback' in res.stdout and res.stdout.count('TrainEvalCallback')==len(folders)
