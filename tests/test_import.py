"Importing the package changes nothing in fastai"
import json, subprocess, sys

code = '''
import inspect, json, sys, warnings
warnings.filterwarnings('ignore')
from fastai.vision.all import *
from fastai.text.all import *
from fastai.tabular.all import *
import fastai.callback.all, signal
before_defaults = list(defaults.callbacks)

def state():
    mods = {k:m for k,m in sys.modules.items() if k.split('.')[0] in ('fastai','fastcore') or k in ('torch.nn.modules.module','torch.optim.optimizer')}
    names = {f'{k}.{n}':id(v) for k,m in mods.items() for n,v in list(vars(m).items()) if not n.startswith('__')}
    classes = {v for m in mods.values() for v in list(vars(m).values()) if inspect.isclass(v)}
    attrs = {f'{c.__module__}.{c.__qualname__}.{n}':id(v) for c in classes for n,v in list(vars(c).items()) if n not in ('__doc__','__abstractmethods__','_abc_impl')}
    return set(mods),names,attrs
mods,names,attrs = state()
handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}
from fastai_callbacks_ext.all import *
after_mods,after_names,after_attrs = state()
new = {k for k in after_names if k.split('.')[0] in ('fastai','fastcore') and any(k.startswith(m+'.') for m in after_mods-mods)}
changed = [k for k in names if names[k]!=after_names.get(k)] + [k for k in after_names if k not in names and k not in new]
changed += [k for k in attrs if attrs[k]!=after_attrs.get(k)] + [k for k in after_attrs if k not in attrs and not any(m in k for m in after_mods-mods)]
assert {s: signal.getsignal(s) for s in signal.valid_signals()}==handlers and list(defaults.callbacks)==before_defaults
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
    for o in ('ModelResetter','RNNCallback','RNNRegularizer','rnn_cbs','TerminateOnNaNCallback'): assert ns[o].__module__.startswith('fastai_callbacks_ext'), o
